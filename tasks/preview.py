"""What the current params mean, in seconds and without training: ``python tasks/preview.py [--jobs N]``."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace

from _task import check_options, run  # first: it makes the package importable

import _measure
from _estimate import START_SECONDS, in_words, recorded, total

from hobs_rspar import config, networks, surgery
from hobs_rspar.allocation.uniform import uniform_widths
from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError
from hobs_rspar.paths import Paths

SHAPES = {"fashion_mnist": (10, 1, 28, 60_000), "cifar10": (10, 3, 32, 50_000), "cifar100": (100, 3, 32, 50_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at once, for the estimated time")
    jobs = parser.parse_args().jobs
    params = config.load()
    check_options(params)
    spec, images = shape(params)
    network = networks.build(spec)
    groups = surgery.groups(network, spec.example())
    print(headline(params, spec, groups))
    widths_and_loss(params, groups)
    print(stages(params))
    print(wall_time(params, spec, network, groups, images, jobs))


def shape(params: config.Params) -> tuple[networks.NetworkSpec, int]:
    """The network's spec, and the number of training images; from the manifest once the data stage has run."""
    manifest = Paths.of(params.study).data / "manifest.json"
    if manifest.exists():
        about = json.loads(manifest.read_text())
        classes, (channels, size, _), images = len(about["classes"]), about["image_shape"], about["images"]["train"]
    elif params.study.dataset in SHAPES:
        classes, channels, size, every = SHAPES[params.study.dataset]
        images = every - params.data.validation - params.data.calibration
    else:
        raise UserError(f"the shape of '{params.study.dataset}' is known once its images have been read: run "
                        "'dvc repro data', then 'make preview' again")
    images = min(images, params.data.train_images or images)
    return networks.NetworkSpec(params.study.network, classes, channels, size), images


def headline(params: config.Params, spec: networks.NetworkSpec, groups: Groups) -> str:
    return (f"study {params.study.name}: {spec.name} on {params.study.dataset} "
            f"({spec.in_channels}x{spec.image_size}x{spec.image_size}, {spec.classes} classes)\n"
            f"{len(groups)} groups, {groups.sizes.sum()} channels, {groups.dense_macs / 1e6:.1f} M MACs dense")


def widths_and_loss(params: config.Params, groups: Groups) -> None:
    """A table: channels of every group, and how many uniform widths keep, with H-OBS's predicted loss if there is."""
    budget = params.study.budget.macs
    if budget is None:
        print("budget: a latency; widths are known once it has been measured")
        return
    widths = uniform_widths(groups, budget, params.allocation.min_ratio, params.allocation.tolerance)
    scores = hobs_scores(params, groups)
    print(f"{'group':24} {'channels':>8} {'uniform':>8} {'predicted loss':>15}")
    for group, width in zip(groups, widths):
        loss = predicted_loss(scores[group.name], int(width)) if scores else None
        print(f"{group.name:24} {group.channels:8} {width:8} " + (f"{loss:15.4f}" if scores else f"{'-':>15}")
              + (f"  kept whole: {group.protected}" if group.protected else ""))
    kept = groups.macs(widths) / groups.dense_macs
    print(f"budget {budget:g}x MACs; uniform widths keep {kept:.4f}x")
    if not scores:
        print("predicted loss: known once sensitivity has run ('dvc repro sensitivity')")


def hobs_scores(params: config.Params, groups: Groups) -> dict[str, list[float]]:
    """What H-OBS expects the loss to rise by, per channel in its order of removal; empty before sensitivity has run."""
    path = Paths.of(params.study).dense / "scores.json"
    if not path.exists():
        return {}
    scores = {entry["name"]: entry["scores"]["hobs"] for entry in json.loads(path.read_text())["groups"]}
    return scores if set(scores) == {group.name for group in groups} else {}


def predicted_loss(scores: list[float], kept: int) -> float:
    """The channels that cost least go first; each score already counts those before it as gone."""
    return sum(sorted(scores)[:len(scores) - kept])


def stages(params: config.Params) -> str:
    cells = len(params.cells)
    return (f"{len(params.study.methods)} methods x {len(params.study.seeds)} seeds = {cells} cells, "
            f"{4 * cells + 5} stages")


def wall_time(params: config.Params, spec, network, groups: Groups, images: int, jobs: int) -> str:
    """Estimated time of ``make repro`` from nothing, from recorded times or from a few measured steps."""
    speed = _measure.Speed.of(network, spec, params)
    times = recorded(params)
    guess = {cell: times.get(cell) or estimated_cell(params, cell, speed, spec, images) for cell in params.cells}
    dense = speed.training_seconds(params.pretrain, images, spec.image_size)
    seconds = dense + 4 * START_SECONDS + total(params, guess, jobs)
    basis = f"{len(times)} cells' recorded times, " if times else ""
    return (f"make repro from nothing: about {in_words(seconds)} with JOBS={jobs}, of which pretraining "
            f"{in_words(dense)} ({basis}measured here just now: training {speed.train:.0f} images/s and inference "
            f"{speed.infer:.0f} images/s in one thread; a pruned network trains faster by "
            f"{_measure.PRUNED_SPEEDUP(params):.1f}x, {START_SECONDS:g} s to start each stage)")


def estimated_cell(params: config.Params, cell: str, speed: _measure.Speed, spec, images: int) -> float:
    """Recovery and, for methods that search, the evaluations of their rewards."""
    method = cell.rpartition("-")[0]
    options = params.methods[method]
    searched = options.get("iterations", 0) * options.get("episodes", 0) * options.get("images", 0)
    faster = 1 if method == "unpruned" else _measure.PRUNED_SPEEDUP(params)
    return speed.training_seconds(params.finetune, images, spec.image_size) / faster + searched / (speed.infer * faster)

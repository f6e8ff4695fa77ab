"""What the current params mean, in seconds and without training: ``python tasks/preview.py [--jobs N]``."""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np

import _measure
from _estimate import START_SECONDS, experiment_seconds, experiments, in_words, made_with, recorded, total
from _task import check_options, default_jobs, run
from hobs_rspar import checkpoint, config, data, networks, sources, surgery
from hobs_rspar.allocation.rounding import in_multiples
from hobs_rspar.allocation.space import Space
from hobs_rspar.coupling import Groups
from hobs_rspar.device import resolve_device
from hobs_rspar.methods import _registry
from hobs_rspar.paths import Paths

SHAPES = {"fashion_mnist": (10, 1, 28, 60_000), "cifar10": (10, 3, 32, 50_000), "cifar100": (100, 3, 32, 50_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="cells at once, for the estimated time")
    params = config.load()
    jobs = parser.parse_args().jobs or default_jobs(params)
    check_options(params)
    spec, images = shape(params)
    network = networks.build(spec)
    networks.check(network, spec, backward=True)
    groups = surgery.groups(network, spec.example())
    print(headline(params, spec, groups))
    widths_and_loss(params, groups)
    print(stages(params))
    print(wall_time(params, spec, network, groups, images, jobs))


def shape(params: config.Params) -> tuple[networks.NetworkSpec, int]:
    """The network's spec, and the number of training images: of the data that params.yaml names now.

    What the data stage read last may be another folder, or another size: an image folder is counted itself, without
    opening its files, and the shapes of the other data sets are known.
    """
    if params.study.dataset == "image_folder":
        train, _ = sources.folders(params.data)
        classes, channels, size, every = len(train.classes), 3, params.data.image_size, len(train)
    else:
        classes, channels, size, every = SHAPES[params.study.dataset]
    left = data.left_for_training(every, params.study.dataset, params.data)
    spec = networks.NetworkSpec(params.study.network, classes, channels, size)
    return spec, min(left, params.data.train_images or left)


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
    widths = uniform(params, groups)
    scores = hobs_scores(params, groups)
    print(f"{'group':24} {'channels':>8} {'uniform':>8} {'predicted loss':>15}")
    for group, width in zip(groups, widths):
        loss = predicted_loss(scores[group.name], int(width)) if scores else None
        print(f"{group.name:24} {group.channels:8} {width:8} " + (f"{loss:15.4f}" if scores else f"{'-':>15}")
              + (f"  kept whole: {group.protected}" if group.protected else ""))
    kept = groups.macs(widths) / groups.dense_macs
    print(f"budget {budget:g}x MACs; uniform widths keep {kept:.4f}x")
    if not scores:
        print("predicted loss: known once sensitivity has run for this network and data ('dvc repro sensitivity')")


def uniform(params: config.Params, groups: Groups) -> np.ndarray:
    """Widths at one common ratio, in multiples of allocation.round_to [groups]."""
    options = params.allocation
    space = Space(groups, params.study.budget.macs, options.min_ratio, options.tolerance, round_to=options.round_to)
    return in_multiples(space, space.uniform)


def hobs_scores(params: config.Params, groups: Groups) -> dict[str, list[float]]:
    """What H-OBS expects the loss to rise by, per channel in its order of removal; empty before sensitivity has run."""
    path = Paths.of(params.study).dense / "scores.json"
    if not made_with(params, "data", "pretrain", "sensitivity") or not path.exists():
        return {}
    scores = {entry["name"]: entry["scores"]["hobs"] for entry in json.loads(path.read_text())["groups"]}
    return scores if set(scores) == {group.name for group in groups} else {}


def predicted_loss(scores: list[float], kept: int) -> float:
    """The channels that cost least go first; each score already counts those before it as gone."""
    return sum(sorted(scores)[:len(scores) - kept])


def stages(params: config.Params) -> str:
    cells = len(params.cells)
    others = len(experiments(params)) + len(params.speed.cells) + len(params.export.cells)
    return (f"{len(params.study.methods)} methods x {len(params.study.seeds)} seeds = {cells} cells, "
            f"{4 * cells + others + 5} stages")


def wall_time(params: config.Params, spec: networks.NetworkSpec, network, groups: Groups, images: int,
              jobs: int) -> str:
    """Estimated time of ``make repro`` from nothing: recorded times of cells, else a few measured steps."""
    device, recipe = resolve_device(params.device), params.finetune
    pruned = shrunk(params, network, groups)
    dense_seconds = full_size_images(params.pretrain, images, spec.image_size) / \
        _measure.training_speed(network, spec, params.pretrain, device) if params.pretrain.source == "train" else 0.0
    teacher = network if recipe.distillation.weight > 0 else None
    speed = {name: _measure.training_speed(net, spec, recipe, device, teacher)
             for name, net in (("dense", network), ("pruned", pruned))}
    infer = _measure.inference_speed(pruned, spec, recipe.precision, device)
    known, guess = recorded(params) if made_with(params, "data", "pretrain") else {}, {}
    for cell in params.cells:
        kind = "dense" if cell.startswith("unpruned-") else "pruned"
        trained = full_size_images(recipe, images, spec.image_size) + sum(recipe.curve)
        allocated = allocation_seconds(params, cell, speed["dense"], infer)
        guess[cell] = known.get(cell, trained / speed[kind] + allocated)
    timed = experiment_seconds(params)
    seconds = dense_seconds + 4 * START_SECONDS + total(params, guess, jobs) + sum(timed)
    return (f"make repro from nothing: about {in_words(seconds)} with JOBS={jobs}, of which pretraining "
            f"{in_words(dense_seconds)}\n  how: {len(known)} cells have recorded times; else epochs x images / speed, "
            f"measured just now: training {speed['dense']:.0f} images/s dense, {speed['pruned']:.0f} pruned, inference "
            f"{infer:.0f} pruned; {START_SECONDS:g} s to start a stage; experiments: {len(timed)} of "
            f"{len(experiments(params))} have recorded times, the others are not counted")


def full_size_images(recipe, images: int, size: int) -> float:
    """Images of all epochs, in units of full-size images: a crop costs its share of the pixels."""
    images = min(images, recipe.images or images)
    return images * sum((crop / size) ** 2 for crop in recipe.crops or [size] * recipe.epochs)


def allocation_seconds(params: config.Params, cell: str, training: float, infer: float) -> float:
    """Of the plans that a method's search runs, at most, or of the dense network's training by the method.

    Args:
        params: of the study.
        cell: ``<method>-<seed>``.
        training: images/s of the dense network; those that gates learn from count as the weights' do.
        infer: images/s of a pruned network.
    """
    name = cell.rpartition("-")[0]
    options = _registry.options(name, params.methods[name]).model_dump()
    if "first" in options:
        return (options["first"] + options["rounds"] * options["measured"]) * options["images"] / infer
    if "learning_rate" in options:
        return options["images"] * (2 if "gate_rate" in options else 1) / training
    return 0


def shrunk(params: config.Params, network, groups: Groups):
    """The network with uniform widths; the dense one where the budget is a latency."""
    if params.study.budget.macs is None:
        return network
    state = groups.sliced(network.state_dict(), [range(int(width)) for width in uniform(params, groups)])
    return checkpoint.fit(copy.deepcopy(network), state, "preview")


if __name__ == "__main__":
    run(main)

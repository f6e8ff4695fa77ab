"""Ours beside what Torch-Pruning makes of the same network by itself: ``python benchmarks/peers.py`` (half an hour).

Its own pruner and criteria, used as its examples do, down to the study's MACs; then the same recovery, the same images
and one timing for all networks in turns. Validation images and seeds of development: test images are not looked at.
"""

import copy
import statistics as plain
import time
from collections.abc import Callable, Iterator

import torch
import torch_pruning as tp
from _bench import Bench, budget_of_macs, publish_tables
from _experiment import run
from torch import nn
from torch.nn import functional as F

from hobs_rspar import config, cost
from hobs_rspar.curvature import repair
from hobs_rspar.data import Images
from hobs_rspar.device import keep_freed_memory
from hobs_rspar.progress import bar

SEEDS = (0, 1)  # of development
STEPS = 40  # of Torch-Pruning's pruner, from all channels to none; scores are computed anew before each
IMAGES = 128  # calibration images of its gradients before each step
BATCH, SECONDS = 64, 20  # of the timing, for all networks together
OURS = ("hobs_uniform", "hobs_rspar")
COLUMNS = [["network", "Network"], ["macs_ratio", "MACs kept"], ["params_ratio", "Parameters kept"],
           ["before", "Before recovery (%)"], ["top1", "Top-1 after recovery (%)"], ["seconds", "Seconds to prune"],
           ["speedup", f"Speedup, batch {BATCH}"]]
Backward = Callable[[nn.Module, Images], None]


def once(importance) -> Backward:
    """The gradient of the mean loss, which Taylor's criterion reads from the parameters."""
    def backward(network: nn.Module, images: Images) -> None:
        network.zero_grad()
        F.cross_entropy(network(images.normalised(images.pixels)), images.labels).backward()
    return backward


def by_image(importance) -> Backward:
    """Squared gradients, image by image, as the Hessian criterion of Torch-Pruning asks for."""
    def backward(network: nn.Module, images: Images) -> None:
        importance.zero_grad()
        for x, label in images.batches(1):
            network.zero_grad()
            F.cross_entropy(network(x), label).backward()
            importance.accumulate_grad(network)
    return backward


# name -> criterion, the gradients that it needs, whether it compares channels of all layers
PEERS = {
    "GroupMagnitude, uniform": (tp.importance.GroupMagnitudeImportance, None, False),
    "GroupMagnitude, global": (tp.importance.GroupMagnitudeImportance, None, True),
    "GroupTaylor, global": (tp.importance.GroupTaylorImportance, once, True),
    "GroupHessian, global": (tp.importance.GroupHessianImportance, by_image, True),
}


def main() -> None:
    keep_freed_memory()
    started, params = time.perf_counter(), config.load()
    budget = budget_of_macs(params, "Torch-Pruning knows no budget of latency")
    torch.set_num_threads(params.allocation.threads)
    bench = Bench(params, OURS[0])
    networks = dict([*theirs(bench), *ours(params)])
    speedups = bench.speedups([network for network, _ in networks.values()], BATCH, SECONDS)
    rows = [row(bench, name, network, seconds, speedup)
            for (name, (network, seconds)), speedup in zip(networks.items(), speedups, strict=True)]
    study = params.study
    subject = f"{study.network} on {study.dataset} at {budget:g}x MACs, CPU, 1 thread"
    note = (f"Torch-Pruning {tp.__version__}'s own pruner in {STEPS} steps, stopped at the step nearest to the budget; "
            "where that is more than 1 % off, compare with care. Batch norms are re-estimated for all before recovery. "
            f"Validation images, mean over seeds {', '.join(map(str, SEEDS))} of recovery by the study's recipe. "
            "Speedup: dense time / pruned time, all networks timed in turns.")
    publish_tables(params, subject, started, [
        {"name": "peers", "title": f"Torch-Pruning by itself and ours: {subject}", "note": note, "columns": COLUMNS,
         "rows": rows}])


def theirs(bench: Bench) -> Iterator[tuple[str, tuple[nn.Module, float]]]:
    """Name, network and seconds for every criterion of Torch-Pruning."""
    for name, (criterion, gradients, everywhere) in PEERS.items():
        started, importance = time.perf_counter(), criterion()
        backward = gradients(importance) if gradients else None
        yield f"Torch-Pruning: {name}", (pruned(bench, importance, backward, everywhere), time.perf_counter() - started)


def pruned(bench: Bench, importance, backward: Backward | None, everywhere: bool) -> nn.Module:
    """The dense network after as many of the pruner's steps as come nearest to the budget."""
    network, example = copy.deepcopy(bench.network), bench.spec.example()
    classifier = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(network, example, importance, global_pruning=everywhere, pruning_ratio=1.0,
                                  max_pruning_ratio=0.9, iterative_steps=STEPS, ignored_layers=classifier)
    budget = bench.params.study.budget.macs * cost.count(network, example).macs
    images = bench.splits["calibration"].first(IMAGES)
    for _ in range(STEPS):
        before = copy.deepcopy(network)
        if backward:
            backward(network, images)
        pruner.step()
        network.zero_grad()
        if cost.count(network, example).macs <= budget:
            break
    return min(before, network, key=lambda made: abs(cost.count(made, example).macs - budget))


def ours(params: config.Params) -> Iterator[tuple[str, tuple[nn.Module, float]]]:
    """Name, repaired network and seconds for ours."""
    for name in OURS:
        bench, started = Bench(params, name), time.perf_counter()
        yield name, (bench.pruned(bench.plan(params.methods[name], SEEDS[0])), time.perf_counter() - started)


def row(bench: Bench, name: str, network: nn.Module, seconds: float, speedup: float) -> dict:
    """Validation accuracy before and after recovery, and what the network costs."""
    example = bench.spec.example()
    if name not in OURS:
        repair.reestimate_batchnorm(network, bench.splits["calibration"].first(bench.params.prune.images))
    dense, small = (cost.count(which, example) for which in (bench.network, network))
    before = bench.validated(network)
    after = [bench.recovered(copy.deepcopy(network), seed) for seed in bar(SEEDS, name)]
    return {"network": name, "macs_ratio": round(small.macs / dense.macs, 4),
            "params_ratio": round(small.params / dense.params, 4), "before": round(before, 2),
            "top1": round(plain.fmean(after), 2), "seconds": round(seconds, 1), "speedup": round(speedup, 2)}


if __name__ == "__main__":
    run(main)

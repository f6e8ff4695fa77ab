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
from _experiment import publish, run
from torch import nn
from torch.nn import functional as F
from tuning import Bench

from hobs_rspar import config, cost, training
from hobs_rspar.curvature import repair
from hobs_rspar.data import Images
from hobs_rspar.device import keep_freed_memory
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import timing
from hobs_rspar.methods import _registry
from hobs_rspar.progress import bar
from hobs_rspar.strided import sliced

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
    if params.study.budget.macs is None:
        raise UserError("params.yaml: study.budget.macs is null, but Torch-Pruning knows no budget of latency; set it, "
                        "and the latencies to null")
    torch.set_num_threads(params.allocation.threads)
    bench = Bench(params, OURS[0])
    networks = dict([*theirs(bench), *ours(params)])
    speedups = in_turns(bench, [network for network, _ in networks.values()])
    rows = [row(bench, name, network, seconds, speedup)
            for (name, (network, seconds)), speedup in zip(networks.items(), speedups, strict=True)]
    study = params.study
    subject = f"{study.network} on {study.dataset} at {study.budget.macs:g}x MACs, CPU, 1 thread"
    note = (f"Torch-Pruning {tp.__version__}'s own pruner in {STEPS} steps, stopped at the step nearest to the budget; "
            "where that is more than 1 % off, compare with care. Batch norms are re-estimated for all before recovery. "
            f"Validation images, mean over seeds {', '.join(map(str, SEEDS))} of recovery by the study's recipe. "
            "Speedup: dense time / pruned time, all networks timed in turns.")
    publish(params, {"claim": None, "measured": None, "lo": None, "hi": None, "unit": "", "holds": None, "reason": "",
                     "conditions": subject, "seconds": round(time.perf_counter() - started, 1),
                     "tables": [{"name": "peers", "title": f"Torch-Pruning by itself and ours: {subject}", "note": note,
                                 "columns": COLUMNS, "rows": rows}]})


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
        plan = _registry.method(name).plan(bench.context(SEEDS[0]), _registry.options(name, params.methods[name]))
        yield name, (bench.pruned(plan), time.perf_counter() - started)


def in_turns(bench: Bench, networks: list[nn.Module]) -> list[float]:
    """Time of the dense network / time of each."""
    device = torch.device("cpu")
    every = [timing.prepared(copy.deepcopy(network), device) for network in (bench.network, *networks)]
    x = timing.example((BATCH, *bench.spec.example().shape[1:]), device)
    dense, *others = (samples.median for samples in timing.measure(every, x, timing.Schedule(SECONDS)))
    return [dense / other for other in others]


def row(bench: Bench, name: str, network: nn.Module, seconds: float, speedup: float) -> dict:
    """Validation accuracy before and after recovery, and what the network costs."""
    example, validation = bench.spec.example(), bench.splits["validation"]
    if name not in OURS:
        repair.reestimate_batchnorm(network, bench.splits["calibration"].first(bench.params.prune.images))
    dense, small = (cost.count(which, example) for which in (bench.network, network))
    before = training.accuracy(training.logits(network, validation), validation.labels)
    after = [recovered(bench, copy.deepcopy(network), seed) for seed in bar(SEEDS, name)]
    return {"network": name, "macs_ratio": round(small.macs / dense.macs, 4),
            "params_ratio": round(small.params / dense.params, 4), "before": round(before, 2),
            "top1": round(plain.fmean(after), 2), "seconds": round(seconds, 1), "speedup": round(speedup, 2)}


def recovered(bench: Bench, network: nn.Module, seed: int) -> float:
    recipe = bench.params.finetune
    teacher = bench.network if recipe.distillation.weight > 0 else None
    task = training.Task(network, bench.splits["train"], bench.splits["validation"], recipe, seed, "finetune", teacher)
    with sliced(network):
        return training.fit(task, training.State(), lambda state: None).history[-1]["validation_top1"]


if __name__ == "__main__":
    run(main)

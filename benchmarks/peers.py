"""Ours beside what Torch-Pruning makes of the same network by itself: ``python benchmarks/peers.py`` (half an hour).

Its own pruner and criteria, used as its examples do, down to the study's MACs; then the same recovery, the same images
and one timing for all networks in turns. Validation images and seeds of development: test images are not looked at.

A second table is of an ImageNet network without any training (benchmarks/_oneshot.py); it needs a folder with weights
and images, which the environment variable ``IMAGENET_SAMPLE`` names.
"""

import copy
import statistics as plain
import time
from collections.abc import Iterator

import torch
import torch_pruning as tp
from torch import nn

from _bench import Bench, budget_of_macs, publish_tables
from _experiment import run
from _oneshot import table as oneshot_table
from _torch_pruning import PEERS, STEPS, Task
from hobs_rspar import config, cost
from hobs_rspar.curvature import repair
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.progress import bar

SEEDS = (0, 1)  # of development
IMAGES = 128  # calibration images of Torch-Pruning's gradients before each of its steps
BATCH, SECONDS = 64, 20  # of the timing, for all networks together
OURS = ("hobs_uniform", "hobs_rspar")
COLUMNS = [["network", "Network"], ["macs_ratio", "MACs kept"], ["params_ratio", "Parameters kept"],
           ["before", "Before recovery (%)"], ["top1", "Top-1 after recovery (%)"], ["seconds", "Seconds to prune"],
           ["speedup", f"Speedup, batch {BATCH}"]]


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
         "rows": rows}, oneshot_table()])


def theirs(bench: Bench) -> Iterator[tuple[str, tuple[nn.Module, float]]]:
    """Name, network and seconds for every criterion of Torch-Pruning."""
    task = Task(bench.network, bench.spec.example(), bench.splits["calibration"].first(IMAGES),
                bench.params.study.budget.macs)
    for name, peer in PEERS.items():
        started = time.perf_counter()
        yield f"Torch-Pruning: {name}", (task.pruned(peer), time.perf_counter() - started)


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

"""AdaPrune's masked sparsity at the study's budget, after the study's recovery: ``python benchmarks/masked.py``.

Its zeros leave every tensor as large as it was, so it is compared in a table of its own, on validation images: accuracy
before and after a recovery in which the zeros stay, and what a dense kernel gains by them. It takes as long as a
recovery of the dense network for each direction and seed.
"""

import copy
import statistics as plain
import time

import torch
from torch import nn

from _bench import Bench, budget_of_macs, publish_tables
from _experiment import run
from hobs_rspar import adaprune, config
from hobs_rspar.evidence.statistics import mean_interval
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.progress import bar

GROUP = 16  # weights that are fetched together
BATCH, SECONDS = 64, 4  # of the timing, for both networks together
COLUMNS = [["direction", "Groups along"], ["n", "n"], ["top1", "Top-1 (%)"], ["top1_lo", "95 % from"],
           ["top1_hi", "to"], ["top1_before_recovery", "Before recovery (%)"], ["macs_ratio", "MACs not by zero"],
           ["weights_ratio", "Weights not zero"], ["speedup", f"Speedup, batch {BATCH}"]]


def main() -> None:
    keep_freed_memory()
    started, params = time.perf_counter(), config.load()
    budget = budget_of_macs(params, "masked weights save no time that a latency budget could limit")
    torch.set_num_threads(params.allocation.threads)
    bench, study = Bench(params, "unpruned"), params.study
    rows = [row(bench, direction, budget) for direction in adaprune.AXES]
    subject = f"{study.network} on {study.dataset} at {budget:g}x MACs, CPU, 1 thread"
    note = (f"Validation images; T16 has the other methods' validation accuracy. A surrogate of AdaPrune, by its "
            f"abstract: equally many zeros in every group of {GROUP} weights. Mean over {len(study.seeds)} seeds of "
            "recovery, with the t interval where there are several. Speedup: dense time / masked time in PyTorch's "
            "dense kernels, which multiply by zeros; on an accelerator that skips them: not measured, none is at hand.")
    publish_tables(params, subject, started, [
        {"name": "masked", "title": f"Masked sparsity: {subject}", "note": note, "columns": COLUMNS, "rows": rows}])


def row(bench: Bench, direction: str, budget: float) -> dict:
    """The outcome of one direction over the study's seeds."""
    example = bench.spec.example().to(bench.device)
    masks = adaprune.masks(bench.network, example, budget, direction, GROUP)
    masked = copy.deepcopy(bench.network)
    adaprune.hold(masked, masks)
    after = [recovered(bench, masked, masks, seed) for seed in bar(bench.params.study.seeds, direction)]
    interval = mean_interval(after, bench.params.report.confidence) if len(after) > 1 else None
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    speedup, = bench.speedups([masked], BATCH, SECONDS)
    return {"direction": f"{direction} channels", "n": len(after), "top1": round(plain.fmean(after), 2),
            "top1_lo": interval and round(interval.lo, 2), "top1_hi": interval and round(interval.hi, 2),
            "top1_before_recovery": round(bench.validated(masked), 2),
            "macs_ratio": round(adaprune.kept_macs(masked, example, masks), 4),
            "weights_ratio": round(1 - zeros / sum(p.numel() for p in masked.parameters()), 4),
            "speedup": round(speedup, 3)}


def recovered(bench: Bench, masked: nn.Module, masks: adaprune.Masks, seed: int) -> float:
    """Validation accuracy in percent after the study's recovery, with the zeros held."""
    network = copy.deepcopy(masked)
    return bench.recovered(network, seed, lambda images: adaprune.hold(network, masks))


if __name__ == "__main__":
    run(main)

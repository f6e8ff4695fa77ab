"""What widths in multiples of 2, 4 and 8 cost in accuracy and gain in speed: ``python benchmarks/rounding.py``.

One search of ``hobs_rspar`` for every seed of development; its widths are then rounded to each multiple (never above
the budget), and the networks go through the same repair, recovery and timing in turns. Uniform widths, too, as what
rounds best by itself. Validation images: test images are not looked at. The table says what ``allocation.round_to``
should be on this machine.
"""

import statistics as plain
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from _bench import Bench, publish_tables
from _experiment import run
from hobs_rspar import config, cost
from hobs_rspar.errors import UserError
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar

SEEDS = (0, 1)  # of development
MULTIPLES = (1, 2, 4, 8, 16)
BATCH, SECONDS = 64, 20  # of the timing, for all networks together
METHODS = ("hobs_uniform", "hobs_rspar")
COLUMNS = [["method", "Method"], ["multiple", "Widths in multiples of"], ["macs_ratio", "MACs kept"],
           ["top1", "Top-1 after recovery (%)"], ["speedup", f"Speedup, batch {BATCH}"],
           ["per_mac", "Speedup / MACs saved"]]


def main() -> None:
    keep_freed_memory()
    started, params = time.perf_counter(), config.load()
    torch.set_num_threads(params.allocation.threads)
    benches = [Bench(params, method) for method in METHODS]
    made = [(bench, multiple, networks) for bench in benches for multiple, networks in rounded(bench)]
    timed = [networks[0] for _, _, networks in made]
    speedups = benches[0].speedups(timed, BATCH, SECONDS)
    rows = [row(*each, speedup) for each, speedup in zip(bar(made, "recovery"), speedups, strict=True)]
    study = params.study
    subject = f"{study.network} on {study.dataset}, CPU, 1 thread"
    note = (f"Widths of the method's own plan, rounded to the nearest multiples that do not exceed the budget. Top-1: "
            f"validation images, mean over seeds {', '.join(map(str, SEEDS))} of search and recovery; MACs and speedup "
            f"of seed {SEEDS[0]}: dense time / pruned time, all networks timed in turns. Speedup / MACs saved: speedup "
            "times kept MACs, 1 where every MAC less saves its time. A multiple that no plan can meet is left out.")
    publish_tables(params, subject, started, [
        {"name": "rounding", "title": f"Widths in multiples: {subject}", "note": note, "columns": COLUMNS,
         "rows": rows}])


def rounded(bench: Bench) -> Iterator[tuple[int, list[nn.Module]]]:
    """Every multiple with the pruned and repaired network of each seed; the plan is searched once for a seed."""
    contexts = [bench.context(seed) for seed in SEEDS]
    plans = [bench.plan(bench.params.methods[bench.method], seed) for seed in SEEDS]
    for multiple in MULTIPLES:
        try:
            changed = [in_multiples_of(multiple, plan, context) for plan, context in zip(plans, contexts, strict=True)]
        except UserError as refusal:
            print(f"{bench.method}, multiples of {multiple}: {refusal}")
            return
        yield multiple, [bench.pruned(plan) for plan in changed]


def in_multiples_of(multiple: int, plan: PruningPlan, context: Context) -> PruningPlan:
    """The plan with rounded widths; the channels go and come back in H-OBS's order."""
    context.space = replace(context.space, round_to=multiple)
    scores = context.per_group(context.sensitivity["hobs"])
    return context.keep_best(scores, [len(kept) for kept in plan.kept], plan.decided_by, repair=plan.repair)


def row(bench: Bench, multiple: int, networks: list[nn.Module], speedup: float) -> dict:
    """Accuracy after recovery, kept MACs and speed of one method at one multiple."""
    example = bench.spec.example()
    ratio = cost.count(networks[0], example).macs / cost.count(bench.network, example).macs
    return {"method": bench.method, "multiple": multiple, "macs_ratio": round(ratio, 4),
            "top1": round(plain.fmean(bench.recovered(network, seed) for network, seed in zip(networks, SEEDS)), 2),
            "speedup": round(speedup, 3), "per_mac": round(speedup * ratio, 3)}


if __name__ == "__main__":
    run(main)

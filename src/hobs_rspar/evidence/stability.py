"""T12 and T13: how much the seeds move, and what each stage of a method costs."""

from __future__ import annotations

import statistics as plain

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

T12_COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    Column("missing", "Cells missing"),
    Column("sd", "Standard deviation (points)", 4, 2),
    Column("lowest", "Lowest top-1 (%)", 4, 2),
    Column("highest", "Highest top-1 (%)", 4, 2),
    Column("width_sd", "Spread of kept ratios (points)", 4, 1),
    Column("spikes", "Rises of the validation loss"),
)
STAGES = ("allocate", "prune", "finetune")
T13_COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    *(Column(stage, f"{stage.capitalize()} (s)", 2, 1) for stage in STAGES),
    Column("total", "Total (s)", 2, 1),
    Column("allocate_share", "Allocate (% of total)", 2, 1),
    Column("search_evaluations", "Allocations evaluated", 1, 0),
    Column("search_images", "Images of the search", 1, 0),
    Column("extra_training_images", "Images trained on before recovery", 1, 0),
    Column("training_images", "Images of recovery", 1, 0),
)


def t12(evidence: Evidence, summary: Summary) -> Table:
    """A row per method: spread of accuracy and of the allocation over seeds, and what went wrong."""
    rows = [_spread(evidence, name) for name in summary.methods]
    note = ("Over seeds, which vary allocation and recovery and share one dense network. Spread of kept ratios: "
            "standard deviation of a group's kept channels in percent of its size, mean over groups; 0 where every "
            "seed keeps the same widths. Rises: epochs of recovery, all seeds together, after which the validation "
            f"loss was higher than after the epoch before. {conditions(evidence)}.")
    return Table("T12", f"T12. Stability: {subject(evidence)}, {summary.n}", note, T12_COLUMNS, rows)


def t13(evidence: Evidence, summary: Summary) -> Table:
    """A row per method: seconds of every stage of a cell, and what they were spent on."""
    rows = [_cost(evidence, name) for name in summary.methods]
    note = ("Mean over cells, wall time of the stages' own work on the machine that ran them, other cells beside them; "
            "– where a stage was restored from cache. All methods share the sensitivity stage; how its time grows with "
            f"channels and images is claim C1's table. {conditions(evidence)}.")
    return Table("T13", f"T13. Cost of each component: {subject(evidence)}, {summary.n}", note, T13_COLUMNS, rows)


def _spread(evidence: Evidence, method: str) -> dict:
    cells = evidence.of(method)
    top1 = [cell["accuracy"]["test"] for cell in cells]
    row = {"method": method, "n": len(cells), "lowest": min(top1), "highest": max(top1),
           "missing": sum(key.rpartition("-")[0] == method for key in evidence.missing),
           "spikes": sum(_rises([epoch["validation_loss"] for epoch in cell["history"]]) for cell in cells)}
    if len(cells) < 2:
        return row
    ratios = [[100 * group["kept_count"] / group["channels"] for group in cell["plan"]["groups"]] for cell in cells]
    return row | {"sd": plain.stdev(top1), "width_sd": plain.fmean(plain.stdev(group) for group in zip(*ratios))}


def _rises(losses: list[float]) -> int:
    return sum(later > earlier for earlier, later in zip(losses, losses[1:]))


def _cost(evidence: Evidence, method: str) -> dict:
    costs = [cell["cost"] for cell in evidence.of(method)]
    seconds = {stage: _mean([cost["seconds"][stage] for cost in costs]) for stage in STAGES}
    row = {"method": method, "n": len(costs)} | seconds
    row |= {key: _mean([cost[key] for cost in costs]) for key in
            ("search_evaluations", "search_images", "extra_training_images", "training_images")}
    if None in seconds.values():
        return row
    total = sum(seconds.values())
    return row | {"total": total, "allocate_share": 100 * seconds["allocate"] / total}


def _mean(values: list[float | None]) -> float | None:
    return None if None in values else plain.fmean(values)

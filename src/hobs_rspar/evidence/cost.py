"""Methods compared at equal total training: what a method trained before recovery is taken from its recovery."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import OURS, leads
from hobs_rspar.evidence.recovery import Budget
from hobs_rspar.evidence.statistics import holm
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    Column("extra", "Images before recovery"),
    Column("top1_equal_recovery", "Top-1 at equal recovery (%)", 4, 2),
    Column("images", "Recovery left (images)"),
    Column("top1", "Top-1 at equal total training (%)", 4, 2),
    Column("top1_lo", "95 % from", 4, 2),
    Column("top1_hi", "to", 4, 2),
    Column("lead", f"Lead of {OURS} (points)", 4, 2),
    Column("lead_lo", "95 % from", 4, 2),
    Column("lead_hi", "to", 4, 2),
    Column("p_adjusted", "Adjusted p", 6, 3),
)


def equal_cost(evidence: Evidence, summary: Summary) -> Table | None:
    """A row per method; None where no method trains before recovery, and equal recovery is equal cost."""
    if not any(method.extra_training for method in summary.methods.values()):
        return None
    affordable = {name: left_over(summary, method.extra_training) for name, method in summary.methods.items()}
    top1 = {name: budget.top1[name] for name, budget in affordable.items() if budget and name in budget.top1}
    ahead = leads(evidence, top1)
    adjusted = holm({name: lead.p_value for name, lead in ahead.items()})
    rows = []
    for name, budget in affordable.items():
        method = summary.methods[name]
        row = {"method": name, "n": method.n, "extra": round(method.extra_training),
               "top1_equal_recovery": method.accuracy.value}
        if name in top1:
            accuracy = budget.accuracy[name]
            row |= {"images": budget.images, "top1": accuracy.value, "top1_lo": accuracy.lo, "top1_hi": accuracy.hi}
        if name in ahead:
            lead = ahead[name].interval
            row |= {"lead": lead.value, "lead_lo": lead.lo, "lead_hi": lead.hi, "p_adjusted": adjusted[name]}
        rows.append(row)
    note = ("Images before recovery: forward and backward passes of a method that trains, its gates' included; the "
            "search of hobs_rspar only evaluates. At equal total training a method has the longest measured recovery "
            "that its images before recovery leave of the study's; – where they exceed it. Mean over seeds with t "
            f"interval; lead paired by seed, Holm over the rivals. {conditions(evidence)}.")
    return Table("cost", f"Equal total training: {subject(evidence)}, {summary.n}", note, COLUMNS, rows)


def left_over(summary: Summary, extra: float) -> Budget | None:
    """The longest measured recovery that, with ``extra`` images before it, is no more than the study's own."""
    fitting = [budget for budget in summary.recovery if budget.seen + extra <= summary.recovery[-1].seen]
    return fitting[-1] if fitting else None

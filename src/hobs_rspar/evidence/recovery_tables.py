"""Tables of what repair and recovery do: ``recovery`` by number of images, ``repair`` by step."""

from __future__ import annotations

import statistics as plain

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import OURS
from hobs_rspar.evidence.recovery import Budget
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

RECOVERY_COLUMNS = (
    Column("method", "Method"),
    Column("images", "Images of recovery"),
    Column("seen", "Seen in whole batches"),
    Column("n", "n"),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_lo", "95 % from", 4, 2),
    Column("top1_hi", "to", 4, 2),
    Column("lead", f"Lead of {OURS} (points)", 4, 2),
    Column("lead_lo", "95 % from", 4, 2),
    Column("lead_hi", "to", 4, 2),
    Column("p_adjusted", "Adjusted p", 6, 3),
)
STEPS = ("cut", "batchnorm", "refit")
REPAIR_COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    Column("repair", "Repair of the plan"),
    Column("cut", "Cut (%)", 4, 2),
    Column("batchnorm", "+ batch norms (%)", 4, 2),
    Column("refit", "+ refit (%)", 4, 2),
    Column("recovered", "After recovery (%)", 4, 2),
    Column("error_cut", "Error, cut", 5, 3),
    Column("error_batchnorm", "Error, + batch norms", 5, 3),
    Column("error_refit", "Error, + refit", 5, 3),
)


def recovery(evidence: Evidence, summary: Summary) -> Table:
    """Accuracy by length of recovery: in the CSV file a row per method and length, for readers a row per method."""
    title = f"Accuracy by length of recovery: {subject(evidence)}, {summary.n}"
    note = ("Top-1 on the test set, mean over seeds with its t interval. Each length is a recovery of its own; 0 is "
            f"the network as repair left it. In round brackets: lead of {OURS}, paired by seed, and its adjusted p "
            f"(paired t-test, Holm over the rivals at this length). Whole batches only. {conditions(evidence)}.")
    rows = [_recovery_row(budget, method) for method in evidence.methods for budget in summary.recovery
            if method in budget.top1]
    columns = (Column("method", "Method"), *(Column(str(budget.images), f"{budget.images:,} images", right=True)
                                             for budget in summary.recovery))
    words = [{"method": method} | {str(budget.images): _in_words(budget, method) for budget in summary.recovery}
             for method in evidence.methods]
    return Table("recovery", title, note, RECOVERY_COLUMNS, rows, Table("recovery", title, note, columns, words))


def repair(evidence: Evidence, summary: Summary) -> Table:
    """What each step of repair is worth before recovery: one row per method."""
    options = evidence.params.prune
    note = (f"Top-1 on the validation set and mean relative output error of the consumers on held-out images, means "
            f"over seeds. Cut: the criterion alone; + batch norms: their statistics estimated anew on {options.images} "
            "calibration images; + refit: the consumers by least squares too, where the plan asks for it. Recovery "
            "starts from the last step that the plan asks for (none: from the cut). "
            f"{conditions(evidence)}.")
    return Table("repair", f"Repair in steps: {subject(evidence)}, {summary.n}", note, REPAIR_COLUMNS,
                 [_repair_row(method, evidence.of(method)) for method in evidence.methods])


def _recovery_row(budget: Budget, method: str) -> dict:
    accuracy, lead = budget.accuracy[method], budget.leads.get(method)
    row = {"method": method, "images": budget.images, "seen": budget.seen, "n": len(budget.top1[method]),
           "top1": accuracy.value, "top1_lo": accuracy.lo, "top1_hi": accuracy.hi}
    if lead is None:
        return row
    return row | {"lead": lead.interval.value, "lead_lo": lead.interval.lo, "lead_hi": lead.interval.hi,
                  "p_adjusted": budget.adjusted[method]}


def _in_words(budget: Budget, method: str) -> str | None:
    """``91.20 [90.98, 91.42] (1.02, p = 0.003)``."""
    if method not in budget.top1:
        return None
    accuracy, lead = budget.accuracy[method], budget.leads.get(method)
    interval = "" if accuracy.lo is None else f" [{accuracy.lo:.2f}, {accuracy.hi:.2f}]"
    if lead is None:
        return f"{accuracy.value:.2f}{interval}"
    p_value = Column("p_adjusted", "", 6, 3).read(budget.adjusted[method])
    sign = "p " if p_value.startswith("<") else "p = "
    return f"{accuracy.value:.2f}{interval} ({lead.interval.value:+.2f}, {sign}{p_value})".replace("-", "−")


def _repair_row(method: str, cells: list[dict]) -> dict:
    row = {"method": method, "n": len(cells), "repair": cells[0]["repair"],
           "recovered": plain.fmean(cell["accuracy"]["validation"] for cell in cells)}
    for step in STEPS:
        found = [cell["repair_steps"][step] for cell in cells if step in cell["repair_steps"]]
        if found:
            row |= {step: plain.fmean(one["top1"] for one in found),
                    f"error_{step}": plain.fmean(one["reconstruction_error"] for one in found)}
    return row

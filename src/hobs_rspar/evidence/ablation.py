"""T8: the method without one of its parts, against the whole method, paired by seed."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import OURS, difference
from hobs_rspar.evidence.statistics import Difference, holm
from hobs_rspar.evidence.summary import MethodSummary, Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

VARIANTS = {
    "hobs_rspar_no_curvature": "curvature: order by L1 norm",
    "hobs_rspar_first_order": "second order: order by the Taylor score",
    "hobs_uniform": "search: uniform widths",
    "hobs_rspar_ppo": "local search: PPO with λ(t) instead (R-SPAR as published)",
    "hobs_rspar_no_penalty": "local search and λ(t): PPO without penalty",
    "hobs_rspar_no_repair": "repair before recovery",
}
DISTILLATION = ("not measured: distillation is in all recoveries of a study or in none; the study no_distillation is "
                "without (make study STUDY=no_distillation)")
COLUMNS = (
    Column("variant", "Variant"),
    Column("without", "Without", wrap=0.2),
    Column("n", "n"),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_before_recovery", "Before recovery (%)", 4, 2),
    Column("difference", f"Difference to {OURS} (points)", 4, 2),
    Column("lo", "95 % from", 4, 2),
    Column("hi", "to", 4, 2),
    Column("p_adjusted", "Adjusted p", 6, 3),
    Column("remark", "Remark", wrap=0.25),
)


def t8(evidence: Evidence, summary: Summary) -> Table:
    """Module ablation: the whole method, then one row per part that is left out."""
    named = VARIANTS | {name: "" for name in summary.methods if name.startswith(f"{OURS}_") and name not in VARIANTS}
    ours = summary.methods.get(OURS)
    differences = {name: difference(evidence, summary.methods[name].top1, ours.top1)
                   for name in named if ours and name in summary.methods}
    adjusted = holm({name: found.p_value for name, found in differences.items() if found})
    rows = [_row(evidence, summary, OURS, "nothing: the whole method", None, None)]
    rows += [_row(evidence, summary, name, part, differences.get(name), adjusted.get(name))
             for name, part in named.items()]
    rows.append({"variant": "distillation", "without": "distillation", "remark": DISTILLATION})
    note = (f"Top-1 on the test set, mean over seeds; before recovery: validation accuracy after repair. Difference: "
            f"variant minus {OURS}, paired by seed, with its interval; below zero the part helps. Adjusted p: paired "
            f"t-test, Holm over the variants measured. {conditions(evidence)}.")
    return Table("T8", f"T8. Module ablation: {subject(evidence)}, {summary.n}", note, COLUMNS, rows)


def _row(evidence: Evidence, summary: Summary, name: str, part: str, found: Difference | None,
         p_adjusted: float | None) -> dict:
    method: MethodSummary | None = summary.methods.get(name)
    if method is None:
        planned = name in evidence.params.study.methods
        reason = "no cell of it is there yet" if planned else "it is not among study.methods"
        return {"variant": name, "without": part, "remark": f"not measured: {reason}"}
    row = {"variant": name, "without": part, "n": method.n, "top1": method.accuracy.value,
           "top1_before_recovery": method.before_recovery, "p_adjusted": p_adjusted}
    if found:
        row |= {"difference": found.interval.value, "lo": found.interval.lo, "hi": found.interval.hi}
    elif name != OURS:
        row |= {"remark": f"difference not measured: it shares fewer than two seeds with {OURS}"}
    return row

"""The tables T1, T10 and T16, named as in the published experiment plan."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.statistics import seeds_needed, smallest_wilcoxon_p
from hobs_rspar.evidence.summary import (
    LATENCY_BATCH,
    OURS,
    REFERENCE,
    THROUGHPUT_BATCH,
    MethodSummary,
    Summary,
    timed_batch,
)
from hobs_rspar.evidence.table_formats import Column, Table

UNITS = {"macs": "x MACs", "latency_ratio": "x latency", "latency_ms": " ms"}  # of study.budget
T1_COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_lo", "95 % from", 4, 2),
    Column("top1_hi", "to", 4, 2),
    Column("top1_before_recovery", "Before recovery (%)", 4, 2),
    Column("macs_ratio", "MACs kept", 5, 3),
    Column("params_ratio", "Parameters kept", 5, 3),
    Column("latency_ms", "Latency (ms)", 4, 3),
    Column("throughput", "Throughput (images/s)", 2, 0),
    Column("energy_j", "Energy (J/image)", 6, 4),
    Column("speedup", "Speedup", 4, 2),
    Column("delta_vs_dense", "Difference to unpruned (points)", 4, 2),
    Column("p_adjusted", "Adjusted p", 6, 3),
)
T10_COLUMNS = (
    Column("method", "Method"),
    Column("n", "n"),
    Column("decided_by", "Decided by"),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_before_recovery", "Before recovery (%)", 4, 2),
    Column("macs_ratio", "MACs kept", 5, 3),
    Column("params_ratio", "Parameters kept", 5, 3),
    Column("search_evaluations", "Allocations evaluated", 1, 0),
    Column("allocate_seconds", "Seconds to allocate", 2, 1),
)
T16_COLUMNS = (
    Column("method", "Method"),
    Column("seed", "Seed"),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_validation", "Validation (%)", 4, 2),
    Column("top1_before_recovery", "Before recovery (%)", 4, 2),
    Column("macs_ratio", "MACs kept", 5, 4),
    Column("latency_ms", "Latency (ms)", 4, 3),
    Column("speedup", "Speedup", 4, 2),
    Column("delta_vs_dense", "Difference to unpruned (points)", 4, 2),
)


def t1(evidence: Evidence, summary: Summary) -> Table:
    """System-level performance: one row per method."""
    confidence = f"{100 * evidence.params.report.confidence:g} %"
    note = (f"Top-1 on the test set: mean over seeds with its {confidence} t interval; before recovery: validation "
            f"accuracy after repair. Latency: p50 at batch {LATENCY_BATCH}; throughput and speedup (dense time / "
            f"pruned time): batch {THROUGHPUT_BATCH}; medians over cells, latency and throughput at the dense "
            f"network's median. Difference to {REFERENCE}: paired by seed. "
            f"Adjusted p: paired t-test of {OURS} against the row, Holm over {len(summary.leads)} rivals. "
            f"{conditions(evidence)}. "
            f"{wilcoxon_note(evidence, summary)}{_trained(summary)}{_flagged(summary)}")
    columns = tuple(Column(c.key, c.heading.replace("95 %", confidence), c.digits, c.shown) for c in T1_COLUMNS)
    rows = [t1_row(method, summary.adjusted.get(name)) for name, method in summary.methods.items()]
    return Table("T1", f"T1. System-level performance: {subject(evidence)}, {summary.n}", note, columns, rows)


def t1_row(method: MethodSummary, p_adjusted: float | None) -> dict:
    """One row of T1 by column key; None where not measured."""
    difference = method.versus_reference
    return {"method": method.method, "n": method.n, "top1": method.accuracy.value, "top1_lo": method.accuracy.lo,
            "top1_hi": method.accuracy.hi, "top1_before_recovery": method.before_recovery,
            "macs_ratio": method.macs_ratio, "params_ratio": method.params_ratio,
            "latency_ms": method.latency.value if method.latency else None, "throughput": method.throughput,
            "energy_j": method.energy, "speedup": method.speedup.value if method.speedup else None,
            "delta_vs_dense": difference.interval.value if difference else None, "p_adjusted": p_adjusted}


def t10(evidence: Evidence, summary: Summary) -> Table:
    """Allocators compared: in the CSV file a row per method, for readers a column per method and a row per group."""
    names = group_names(evidence)
    columns = (*T10_COLUMNS, *(Column(name, name, 4, 2) for name in names))
    rows = [_t10_row(evidence, method) for method in summary.methods.values()]
    note = ("Per group: kept fraction of its channels, mean over seeds. The methods differ in "
            "criterion and allocator together. Seconds: mean over seeds on the machine that allocated; – where the "
            f"plan was restored from cache. {conditions(evidence)}.")
    title = f"T10. Allocators compared, kept ratio per group: {subject(evidence)}, {summary.n}"
    return Table("T10", title, note, columns, rows, reading=_turned(Table("T10", title, note, columns, rows)))


def group_names(evidence: Evidence) -> list[str]:
    """Names of the groups in the network's order."""
    return [group["name"] for group in next(iter(evidence.cells.values()))["plan"]["groups"]]


def kept_ratios(evidence: Evidence, method: str) -> dict[str, float]:
    """Group name to the kept fraction of its channels, mean over seeds."""
    plans = [cell["plan"]["groups"] for cell in evidence.of(method)]
    return {groups[0]["name"]: plain.fmean(group["kept_count"] / group["channels"] for group in groups)
            for groups in zip(*plans, strict=True)}


def t16(evidence: Evidence, summary: Summary) -> Table:
    """The runs behind every mean: one row per cell, then mean and standard deviation per method."""
    rows = [row for name in summary.methods for row in _t16_rows(evidence, summary, name)]
    note = (f"Latency: p50 at batch {LATENCY_BATCH}; speedup: batch {THROUGHPUT_BATCH}; sd: standard deviation over "
            f"seeds (n - 1). A seed varies allocation and recovery; all seeds share one dense network. "
            f"{conditions(evidence)}.")
    return Table("T16", f"T16. Single runs and their spread: {subject(evidence)}", note, T16_COLUMNS, rows)


def subject(evidence: Evidence) -> str:
    """Network, data set and budget in words."""
    study = evidence.params.study
    return f"{study.network} on {study.dataset} at {budget(evidence)}"


def budget(evidence: Evidence) -> str:
    """The study's budget in words, such as ``0.26x MACs``."""
    return in_words(evidence.params.study.budget.model_dump())


def in_words(limit: Mapping[str, float | None]) -> str:
    """A budget in words, given as ``study.budget``: one of its values is not None."""
    (unit, value), = ((unit, value) for unit, value in limit.items() if value is not None)
    return f"{value:g}{UNITS[unit]}"


def conditions(evidence: Evidence) -> str:
    """How the numbers came about: recovery, device, threads, versions."""
    recovery = recovery_in_words(evidence)
    seen = evidence.fingerprint
    if not seen:
        return f"Conditions: {recovery}; no timings"
    measured = f"{seen['mode']} {seen['dtype']} {seen['layout']}" if "mode" in seen else "eager"
    return (f"Conditions: {recovery}; {seen.get('device', evidence.platform)}, {seen.get('threads')} "
            f"thread{'s' * (seen.get('threads') != 1)}, torch {seen.get('torch')}, {measured}")


def _trained(summary: Summary) -> str:
    """Methods that had more training than the recovery; table ``cost`` compares them at equal total."""
    names = [f"{name} ({method.extra_training:,.0f} images)" for name, method in summary.methods.items()
             if method.extra_training]
    return f" Trained before recovery, too: {', '.join(names)}; table cost is at equal total training." if names else ""


def recovery_in_words(evidence: Evidence) -> str:
    """Length and precision of the study's recovery, and whether it had a teacher."""
    recipe = evidence.params.finetune
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)} of recovery"
    length = f"{recipe.epochs * recipe.images:,} images in {epochs}" if recipe.images else epochs
    if found := evidence.precisions:
        length += f" in {' and '.join(found)}"
    return f"{length}, the dense network as teacher" if recipe.distillation.weight > 0 else length


def wilcoxon_note(evidence: Evidence, summary: Summary) -> str:
    """Where the exact Wilcoxon p is, or why it is not printed and how many seeds would do."""
    if not summary.leads:
        return ""
    n = min(lead.n for lead in summary.leads.values())
    needed = seeds_needed(evidence.alpha, len(summary.leads))
    if n >= needed:
        return "Exact Wilcoxon p-values: wilcoxon_p in figures/paired_differences.csv."
    return (f"An exact Wilcoxon test is not printed: with n = {n} it cannot go below {smallest_wilcoxon_p(n):.4g}; "
            f"{needed} seeds would do.")


def _flagged(summary: Summary) -> str:
    cells = dict.fromkeys(flag.partition(":")[0] for method in summary.methods.values() for flag in method.flags)
    return f" The benchmark stage flagged the timing of {', '.join(cells)}." if cells else ""


def _t10_row(evidence: Evidence, method: MethodSummary) -> dict:
    cells = evidence.of(method.method)
    seconds = [cell["cost"]["seconds"]["allocate"] for cell in cells]
    return {"method": method.method, "n": method.n, "decided_by": cells[0]["plan"]["decided_by"],
            "top1": method.accuracy.value, "top1_before_recovery": method.before_recovery,
            "macs_ratio": method.macs_ratio, "params_ratio": method.params_ratio,
            "search_evaluations": plain.fmean(cell["cost"]["search_evaluations"] or 0 for cell in cells),
            "allocate_seconds": None if None in seconds else plain.fmean(seconds),
            **kept_ratios(evidence, method.method)}


def _turned(table: Table) -> Table:
    """Rows become columns: a network has more groups than a page has room for columns."""
    methods = [row["method"] for row in table.rows]
    measured = {column.key for column in T10_COLUMNS}
    rows = [{"quantity": column.heading if column.key in measured else f"Kept in {column.heading}",
             **{row["method"]: column.read(row.get(column.key)) for row in table.rows}}
            for column in table.columns[1:]]
    return Table(table.name, table.title, table.note,
                 (Column("quantity", ""), *(Column(name, name, right=True) for name in methods)), rows)


def _t16_rows(evidence: Evidence, summary: Summary, method: str) -> list[dict]:
    reference = summary.methods[REFERENCE].top1 if REFERENCE in summary.methods and method != REFERENCE else {}
    rows = [_t16_row(method, cell, evidence.timings.get(cell["cell"]), reference) for cell in evidence.of(method)]
    spread = [("mean", plain.fmean)] + [("sd", plain.stdev)] * (len(rows) > 1)
    return rows + [{"method": method, "seed": label} | {
        column.key: _over(rows, column.key, measure) for column in T16_COLUMNS[2:]} for label, measure in spread]


def _t16_row(method: str, cell: dict, timing: dict | None, reference: dict[int, float]) -> dict:
    timings, accuracy, seed = [timing] if timing else [], cell["accuracy"], cell["seed"]
    single, many = timed_batch(timings, LATENCY_BATCH), timed_batch(timings, THROUGHPUT_BATCH)
    return {"method": method, "seed": seed, "top1": accuracy["test"], "top1_validation": accuracy["validation"],
            "top1_before_recovery": accuracy["after_repair"], "macs_ratio": cell["plan"]["macs_ratio"],
            "latency_ms": single[0]["pruned"]["p50_ms"] if single else None,
            "speedup": many[0]["speedup"] if many else None,
            "delta_vs_dense": accuracy["test"] - reference[seed] if seed in reference else None}


def _over(rows: list[dict], key: str, measure) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return measure(values) if len(values) == len(rows) else None

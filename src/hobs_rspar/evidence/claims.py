"""The published claims C1 to C8, each with what was measured here and a computed verdict.

The published numbers are quoted, never used: the document's own tables contradict them. A claim holds when its whole
interval meets the goal; otherwise it does not hold, or it was not measured and the reason is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hobs_rspar.evidence.cells import Evidence, correctness
from hobs_rspar.evidence.claim_files import ClaimTable
from hobs_rspar.evidence.recovery import MARGINS, NONE, SHORT, Standing, standing
from hobs_rspar.evidence.statistics import Interval, crossed_bootstrap, non_inferiority
from hobs_rspar.evidence.summary import OURS, REFERENCE, THROUGHPUT_BATCH, Summary, energy_ratio
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import budget, conditions, subject

HOLDS, FAILS, NOT_MEASURED = "holds", "does not hold", "not measured: "
CLAIMED_MACS = 0.26  # the budget that the published speedup belongs to
NON_INFERIORITY_ALPHA = 0.025  # one-sided, the usual companion of a two-sided 95 % interval
CSV_COLUMNS = (Column("claim", "Claim"), Column("published", "Published", 4), Column("goal", "Goal", 4),
               Column("measured", "Measured", 4), Column("lo", "From", 4), Column("hi", "To", 4),
               Column("unit", "Unit"), Column("verdict", "Verdict"), Column("conditions", "Conditions"))
READING_COLUMNS = (Column("claim", "Claim"), Column("published", "Published", wrap=0.14),
                   Column("goal", "Goal", wrap=0.1), Column("measured", "Measured", 2), Column("lo", "95 % from", 2),
                   Column("hi", "to", 2), Column("unit", "Unit", wrap=0.09),
                   Column("verdict", "Verdict", wrap=0.15), Column("conditions", "Conditions", wrap=0.2))


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        statement: the published claim in words.
        published: its number in ``unit``; None where it has none.
        wanted: the goal here in words.
        goal: the goal as a number in ``unit``; None where it has none.
        verdict: ``holds``, ``does not hold`` or ``not measured: reason``.
    """

    claim: str
    statement: str
    published: float | None
    wanted: str
    goal: float | None
    unit: str
    verdict: str = ""
    interval: Interval | None = None
    conditions: str = ""

    def unmeasured(self, reason: str) -> Claim:
        return replace(self, verdict=NOT_MEASURED + reason.removeprefix(NOT_MEASURED))

    def measured(self, interval: Interval, holds: bool, how: str) -> Claim:
        return replace(self, interval=interval, verdict=HOLDS if holds else FAILS, conditions=how)

    def row(self) -> dict:
        """The row of the CSV file."""
        seen = self.interval or Interval(None, None, None)
        return {"claim": self.claim, "published": self.published, "goal": self.goal, "measured": seen.value,
                "lo": seen.lo, "hi": seen.hi, "unit": self.unit, "verdict": self.verdict,
                "conditions": self.conditions}


def claims(evidence: Evidence, summary: Summary) -> list[Claim]:
    """All eight claims with their verdicts."""
    margin = evidence.params.study.margin_points
    stated = (
        (Claim("C1", "K-FAC sensitivity is 28x faster than exact", 28, "≥ 1500x against Hutchinson with 300 probes",
               1500, "x faster"), _experiment("sensitivity")),
        (Claim("C2", "40.5 % lower reconstruction error than magnitude pruning", 40.5,
               "≥ 45 % lower by the criterion alone", 45, "% lower error"),
         _experiment("reconstruction")),
        (Claim("C3", "13.3 % faster convergence with λ(t)", 13.3, "≥ 2x, that is 100 %", 100, "% faster"),
         _experiment("penalty")),
        (Claim("C4", "3.10x speedup at 0.26x MACs", 3.10, "≥ 3.1x", 3.1, "x"), _speedup),
        (Claim("C5", "2.8x less energy", 2.8, "≥ 2.8x, about the speedup", 2.8, "x"), _energy),
        (Claim("C6", "within 0.17 points of the dense network", -0.17, f"whole interval above −{margin:g}", -margin,
               f"points, {OURS} − {REFERENCE}"), _as_accurate),
        (Claim("C7", "ahead of every baseline at equal MACs (75.96 against 75.82)", 0.14,
               "ahead of every dense-removal baseline after no, short and full recovery, adjusted p < "
               f"{evidence.alpha:g}; of the best repaired one by ≥ {MARGINS[NONE]:g} points without recovery, by ≥ "
               f"{MARGINS[SHORT]:g} after {SHORT:,} images", 0, "points, smallest mean lead"), _ahead),
        (Claim("C8", "PPO allocates better than rules", None, "reward at least that of DP with local search", None,
               "reward"), _experiment("allocators")),
    )
    return [judge(claim, evidence, summary) for claim, judge in stated]


def table(evidence: Evidence, summary: Summary, found: list[Claim]) -> Table:
    """``claims``: numbers in the CSV file; for readers, the published claim and the goal in words."""
    title = f"Claims: {subject(evidence)}"
    note = ("A claim holds when its whole 95 % interval meets the goal. Published numbers are quoted as published. "
            f"{conditions(evidence)}.")
    rows = [claim.row() for claim in found]
    words = [row | {"published": claim.statement, "goal": claim.wanted}
             for row, claim in zip(rows, found, strict=True)]
    return Table("claims", title, note, CSV_COLUMNS, rows, Table("claims", title, note, READING_COLUMNS, words))


def tables_of(evidence: Evidence) -> list[Table]:
    """The tables that the experiments of benchmarks/ wrote; for readers, numbers with four significant digits."""
    return [_as_written(table) for record in evidence.experiments.values() for table in record.tables]


def _as_written(table: ClaimTable) -> Table:
    columns = tuple(Column(key, heading) for key, heading in table.columns)
    whole = Table(table.name, table.title, table.note, columns, table.rows)
    words = [{key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
             for row in table.rows]
    readable = tuple(Column(column.key, column.heading, right=number)
                     for column, number in zip(columns, whole.numeric(), strict=True))
    return replace(whole, reading=Table(table.name, table.title, table.note, readable, words))


Judge = Callable[[Claim, Evidence, Summary], Claim]


def _experiment(name: str) -> Judge:
    """The verdict that ``benchmarks/<name>.py`` wrote for the claim."""
    def judge(claim: Claim, evidence: Evidence, summary: Summary) -> Claim:
        found = next((record for record in evidence.experiments.values() if record.claim == claim.claim), None)
        if found is None:
            planned = name in evidence.params.study.claims
            return claim.unmeasured(f"'dvc repro claim@{name}' has not run" if planned else
                                    f"its experiment, {name}, is not among study.claims")
        claim = replace(claim, unit=found.unit, interval=Interval(found.measured, found.lo, found.hi),
                        conditions=f"{found.conditions}; took {found.seconds:.0f} s")
        if found.holds is None:
            return claim.unmeasured(found.reason)
        return claim.measured(claim.interval, found.holds, claim.conditions)
    return judge


def _speedup(claim: Claim, evidence: Evidence, summary: Summary) -> Claim:
    absent = _absent(evidence, summary, OURS)
    if evidence.params.study.budget.macs != CLAIMED_MACS:
        absent = f"the claim is about {CLAIMED_MACS:g}x MACs, the budget of this study is {budget(evidence)}"
    if absent:
        return claim.unmeasured(absent)
    timings, speedup = evidence.timed(OURS), summary.methods[OURS].speedup
    if speedup is None:
        return claim.unmeasured(_untimed(evidence, timings))
    if speedup.lo is None:
        return claim.unmeasured("the only timing has no interval")
    flagged = f"; flagged: {len(summary.methods[OURS].flags)}" if summary.methods[OURS].flags else ""
    how = (f"median of {len(timings)} cells, bootstrap interval; batch {THROUGHPUT_BATCH}, dense and pruned "
           f"interleaved{flagged}; {subject(evidence)}; {_rest(evidence)}")
    return claim.measured(speedup, speedup.lo >= claim.goal, how)


def _energy(claim: Claim, evidence: Evidence, summary: Summary) -> Claim:
    timings = evidence.timed(OURS)
    absent = _absent(evidence, summary, OURS)
    if absent or not timings:
        return claim.unmeasured(absent or _untimed(evidence, timings))
    ratio = energy_ratio(evidence, timings)
    if ratio is None:
        return claim.unmeasured(timings[0].get("energy_reason") or "the benchmark stage gave no reason")
    if ratio.lo is None:
        return claim.unmeasured("one cell gives no interval; 2 seeds would do")
    return claim.measured(ratio, ratio.lo >= claim.goal, f"median of {len(timings)} cells, bootstrap interval; "
                          f"{subject(evidence)}; {_rest(evidence)}")


def _as_accurate(claim: Claim, evidence: Evidence, summary: Summary) -> Claim:
    absent = _absent(evidence, summary, OURS, REFERENCE)
    if absent:
        return claim.unmeasured(absent)
    ours, reference = summary.methods[OURS].top1, summary.methods[REFERENCE].top1
    common = [seed for seed in ours if seed in reference]
    if len(common) < 2:
        return claim.unmeasured(f"{OURS} and {REFERENCE} share {len(common)} seed(s); 2 would do")
    margin = evidence.params.study.margin_points
    test = non_inferiority([ours[seed] for seed in common], [reference[seed] for seed in common], margin,
                           NON_INFERIORITY_ALPHA)
    over_seeds = Interval(test["mean_difference"], test["lower_bound"],
                          2 * test["mean_difference"] - test["lower_bound"])
    found = {"paired t over seeds": over_seeds} | _over_images(evidence, common)
    kind, interval = min(found.items(), key=lambda item: item[1].lo)
    others = "".join(f"; {name}: from {other.lo:.2f}" for name, other in found.items() if name != kind)
    how = (f"one-sided non-inferiority, alpha = {NON_INFERIORITY_ALPHA:g}, n = {len(common)} paired seeds; interval: "
           f"{kind}{others.replace('-', '−')} (the lower one is shown); conditional on one dense network; "
           f"{subject(evidence)}; {_recovery(evidence)}")
    # T1's mean: of tied logits in bf16, the bits of single images may hold another one as the first.
    return claim.measured(replace(interval, value=test["mean_difference"]), interval.lo > -margin, how)


def _over_images(evidence: Evidence, seeds: list[int]) -> dict[str, Interval]:
    """Interval over seeds and test images together, where the cells hold per-image correctness."""
    bits = [correctness([evidence.cells[f"{method}-{seed}"] for seed in seeds]) for method in (OURS, REFERENCE)]
    if any(found is None for found in bits) or bits[0].shape != bits[1].shape:
        return {}
    report = evidence.params.report
    return {"bootstrap over seeds and images": crossed_bootstrap(*bits, 1 - 2 * NON_INFERIORITY_ALPHA,
                                                                 report.resamples, report.seed)}


def _ahead(claim: Claim, evidence: Evidence, summary: Summary) -> Claim:
    absent = _absent(evidence, summary, OURS)
    if absent or not summary.baselines:
        return claim.unmeasured(absent or f"no dense-removal baseline shares two seeds with {OURS}; 2 seeds would do")
    repaired = {cell["method"] for cell in evidence.cells.values() if cell["repair"] == "least_squares"}
    found = {budget.images: standing(budget, summary.baselines, repaired, evidence.alpha)
             for budget in summary.recovery}
    found = {images: stands for images, stands in found.items() if stands}
    full = found[max(found)]
    named = {"none": found.get(NONE), f"short ({SHORT:,} images)": found.get(SHORT), "full": full}
    parts = "; ".join(f"{name}: {_stands(stands)}" for name, stands in named.items())
    verdicts = {stands.holds for stands in named.values() if stands}
    if None in verdicts and False not in verdicts:
        return claim.unmeasured(f"repair could pass for the criterion: {parts}")
    how = (f"{parts}; the number is that of full recovery; n = {full.lead.n} paired seeds; {full.lead.kind}; Holm over "
           f"{len(summary.leads)} rivals at each; {subject(evidence)}; {_recovery(evidence)}")
    return claim.measured(full.lead.interval, False not in verdicts, how)


def _stands(stands: Standing | None) -> str:
    if stands is None:
        return NOT_MEASURED.rstrip(": ")
    said = {True: HOLDS, False: FAILS, None: NOT_MEASURED.rstrip(": ")}[stands.holds]
    return f"{said} ({stands.how})"


def _absent(evidence: Evidence, summary: Summary, *methods: str) -> str:
    """Why one of the methods has no numbers; empty where all have."""
    for method in methods:
        if method not in summary.methods:
            planned = method in evidence.params.study.methods
            return f"no cell of {method} is there yet" if planned else f"{method} is not among study.methods"
    return ""


def _untimed(evidence: Evidence, timings: list[dict]) -> str:
    if not timings:
        return f"no cell of {OURS} is timed on {evidence.platform or 'any platform'}"
    return f"batch {THROUGHPUT_BATCH} is not among benchmark.batch_sizes"


def _recovery(evidence: Evidence) -> str:
    return conditions(evidence).removeprefix("Conditions: ").partition(";")[0]


def _rest(evidence: Evidence) -> str:
    return conditions(evidence).removeprefix("Conditions: ").partition("; ")[2]

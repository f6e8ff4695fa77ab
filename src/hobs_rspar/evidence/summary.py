"""One summary per method and the paired comparisons: what all tables, figures and claims are made of.

Nothing downstream computes a statistic of its own, so that the page, the tables and the README cannot disagree.
"""

from __future__ import annotations

import statistics as plain
from dataclasses import dataclass

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import OURS, REFERENCE, difference, leads, mean_over_seeds, pairs
from hobs_rspar.evidence.recovery import Budget, budgets
from hobs_rspar.evidence.statistics import (
    Difference,
    Interval,
    exact_wilcoxon,
    holm,
    median_interval,
    seeds_needed,
)

FAMILY = "hobs_"  # methods that share our criterion: rivals in T1, but no baselines of claim C7
LATENCY_BATCH = "1"
THROUGHPUT_BATCH = "64"


@dataclass(frozen=True)
class MethodSummary:
    """What is known about one method; None where not measured.

    Attributes:
        top1: test accuracy by seed, percent.
        accuracy: mean with t interval over seeds, percent.
        before_recovery: mean validation accuracy after repair, percent.
        macs_ratio: kept fraction of the dense MACs, mean over seeds.
        latency: p50 at batch 1, ms, at the platform's usual pace (:func:`at_usual_pace`); median over cells with
            bootstrap interval.
        throughput: images/s at batch 64, at the same pace, median over cells.
        speedup: dense time / pruned time at batch 64, median over cells with bootstrap interval.
        energy: J per image, median over cells.
        versus_reference: paired with ``unpruned`` on common seeds, points.
        extra_training: images that the method trained on before recovery, mean over seeds.
        flags: what the benchmark stage found implausible.
    """

    method: str
    top1: dict[int, float]
    accuracy: Interval
    before_recovery: float
    macs_ratio: float
    params_ratio: float
    latency: Interval | None
    throughput: float | None
    speedup: Interval | None
    energy: float | None
    versus_reference: Difference | None
    extra_training: float
    flags: list[str]

    @property
    def n(self) -> int:
        return len(self.top1)


@dataclass(frozen=True)
class Summary:
    """All methods, and ``hobs_rspar`` against each rival (empty where it is not part of the study).

    Attributes:
        leads: rival to the paired difference ``hobs_rspar - rival``, points; rivals with at least two common seeds.
        adjusted: rival to the p-value of its paired t-test, Holm over all of ``leads``.
        wilcoxon: rival to its exact Wilcoxon p-value, only where n can reach the first Holm step.
        recovery: the same comparison after every length of recovery, the shortest first.
    """

    methods: dict[str, MethodSummary]
    leads: dict[str, Difference]
    adjusted: dict[str, float]
    wilcoxon: dict[str, float]
    recovery: list[Budget]

    @property
    def baselines(self) -> list[str]:
        """Rivals that only remove channels of the dense network, by a criterion that is not ours."""
        return [name for name in self.leads if not name.startswith(FAMILY) and not self.methods[name].extra_training]

    @property
    def n(self) -> str:
        """Seeds per method in words, such as ``n = 5 seeds`` or ``n = 3 to 5 seeds``."""
        counts = sorted({summary.n for summary in self.methods.values()})
        range_of = f"{counts[0]} to " if len(counts) > 1 else ""
        return f"n = {range_of}{counts[-1]} seed{'s' * (counts[-1] > 1)}"


def summarise(evidence: Evidence) -> Summary:
    """Summary of every method with a cell."""
    methods = {name: _method(evidence, name) for name in evidence.methods}
    ahead = leads(evidence, {name: method.top1 for name, method in methods.items()})
    return Summary(methods, ahead, holm({name: lead.p_value for name, lead in ahead.items()}),
                   _wilcoxon(evidence, methods, ahead), budgets(evidence))


def accuracies(evidence: Evidence, method: str) -> dict[int, float]:
    """Test top-1 by seed, percent."""
    return {cell["seed"]: cell["accuracy"]["test"] for cell in evidence.of(method)}


def timed_batch(timings: list[dict], batch: str) -> list[dict]:
    """The entries of one batch size; empty where it was not measured."""
    return [timing["batches"][batch] for timing in timings if batch in timing["batches"]]


def speed_interval(evidence: Evidence, timings: list[dict], batch: str = THROUGHPUT_BATCH) -> Interval | None:
    """Median speedup over cells; a single cell keeps the interval of its own rounds."""
    entries = timed_batch(timings, batch)
    if len(entries) == 1:
        return Interval(*(entries[0][key] for key in ("speedup", "speedup_lo", "speedup_hi")))
    return _median(evidence, [entry["speedup"] for entry in entries])


def at_usual_pace(timings: list[dict], batch: str, key: str, platform: dict[str, dict]) -> list[float]:
    """A measure of each timed network as if the dense network beside it had run at its median pace over all cells.

    A machine's clock wanders in the hours of a study, and cells fall into slower and faster phases. The dense network,
    timed in turns with each of them, falls into the same phase; so the ratio of the two holds, and this is that ratio
    times one dense value for all.

    Args:
        timings: of some cells.
        batch: images, as text.
        key: ``p50_ms`` or ``throughput``.
        platform: all cells' timings on the machine, by cell.
    """
    ratios = [entry["pruned"][key] / entry["dense"][key] for entry in timed_batch(timings, batch)]
    if not ratios:
        return []
    usual = plain.median(entry["dense"][key] for entry in timed_batch(list(platform.values()), batch))
    return [usual * ratio for ratio in ratios]


def energy_ratio(evidence: Evidence, timings: list[dict]) -> Interval | None:
    """Dense J / pruned J per image, median over cells."""
    measured = [timing["energy"] for timing in timings if timing.get("energy")]
    return _median(evidence, [energy["dense_j"] / energy["pruned_j"] for energy in measured])


def _median(evidence: Evidence, values: list[float]) -> Interval | None:
    if len(values) < 2:
        return Interval(values[0], None, None) if values else None
    report = evidence.params.report
    return median_interval(values, report.confidence, report.resamples, report.seed)


def _wilcoxon(evidence: Evidence, methods: dict[str, MethodSummary], ahead: dict[str, Difference]) -> dict[str, float]:
    enough = seeds_needed(evidence.alpha, len(ahead)) if ahead else 0
    paired = {name: pairs(methods[OURS].top1, methods[name].top1) for name, lead in ahead.items() if lead.n >= enough}
    return {name: exact_wilcoxon(*pair, evidence.alpha, len(ahead)) for name, pair in paired.items()}


def _method(evidence: Evidence, name: str) -> MethodSummary:
    cells, timings = evidence.of(name), evidence.timed(name)
    top1 = accuracies(evidence, name)
    throughput = at_usual_pace(timings, THROUGHPUT_BATCH, "throughput", evidence.timings)
    energy = [timing["energy"]["pruned_j"] for timing in timings if timing.get("energy")]
    return MethodSummary(
        method=name,
        top1=top1,
        accuracy=mean_over_seeds(evidence, list(top1.values())),
        before_recovery=plain.fmean(cell["accuracy"]["after_repair"] for cell in cells),
        macs_ratio=plain.fmean(cell["plan"]["macs_ratio"] for cell in cells),
        params_ratio=plain.fmean(cell["plan"]["params_ratio"] for cell in cells),
        latency=_median(evidence, at_usual_pace(timings, LATENCY_BATCH, "p50_ms", evidence.timings)),
        throughput=plain.median(throughput) if throughput else None,
        speedup=speed_interval(evidence, timings),
        energy=plain.median(energy) if energy else None,
        versus_reference=None if name == REFERENCE else difference(evidence, top1, accuracies(evidence, REFERENCE)),
        extra_training=plain.fmean(cell["cost"]["extra_training_images"] for cell in cells),
        flags=[f"{timing['cell']}: {flag}" for timing in timings for flag in timing.get("flags", [])],
    )

"""Methods against each other, paired by seed: one difference, and ``hobs_rspar`` against all of its rivals."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.statistics import Difference, Interval, mean_interval, paired_difference

OURS = "hobs_rspar"
REFERENCE = "unpruned"
BySeed = dict[int, float]  # accuracy in percent by seed


def mean_over_seeds(evidence: Evidence, values: list[float]) -> Interval:
    """Mean with t interval; one value has no interval."""
    if len(values) < 2:
        return Interval(values[0], None, None)
    return mean_interval(values, evidence.params.report.confidence)


def pairs(method: BySeed, baseline: BySeed) -> tuple[list[float], list[float]]:
    """The values of the seeds that both have."""
    common = [seed for seed in method if seed in baseline]
    return [method[seed] for seed in common], [baseline[seed] for seed in common]


def difference(evidence: Evidence, method: BySeed, baseline: BySeed) -> Difference | None:
    """``method - baseline`` in points; None where they share fewer than two seeds."""
    paired, report = pairs(method, baseline), evidence.params.report
    if len(paired[0]) < 2:
        return None
    return paired_difference(*paired, report.confidence, report.resamples, report.seed)


def leads(evidence: Evidence, top1: dict[str, BySeed]) -> dict[str, Difference]:
    """Rival to ``hobs_rspar - rival``; rivals with at least two common seeds, none without ``hobs_rspar``."""
    rivals = [name for name in top1 if name not in (OURS, REFERENCE)] if OURS in top1 else []
    found = {name: difference(evidence, top1[OURS], top1[name]) for name in rivals}
    return {name: lead for name, lead in found.items() if lead}

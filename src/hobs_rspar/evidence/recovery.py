"""Accuracy after recoveries of several lengths, from none to the study's own, and who is ahead after each."""

from __future__ import annotations

from dataclasses import dataclass

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import REFERENCE, BySeed, leads, mean_over_seeds
from hobs_rspar.evidence.statistics import Difference, Interval, holm

NONE, SHORT = 0, 20_000  # images; the lengths that claim C7 names beside the study's own
MARGINS = {NONE: 4.0, SHORT: 1.0}  # points ahead of the best repaired baseline, fixed before the run


@dataclass(frozen=True)
class Budget:
    """All methods after one length of recovery.

    Attributes:
        images: of the recovery; 0 is the network as repair left it.
        seen: the same without what did not fill a batch.
        top1: method to its test accuracy by seed, percent; methods with a cell that measured this length.
        accuracy: method to the mean with t interval over seeds, percent.
        leads: rival to the paired difference ``hobs_rspar - rival``, points.
        adjusted: rival to the p-value of its paired t-test, Holm over all of ``leads``.
    """

    images: int
    seen: int
    top1: dict[str, BySeed]
    accuracy: dict[str, Interval]
    leads: dict[str, Difference]
    adjusted: dict[str, float]


def budgets(evidence: Evidence) -> list[Budget]:
    """One for every length of recovery that a cell has measured, the shortest first."""
    lengths = {point["images"]: point["seen"] for cell in evidence.cells.values() for point in cell["recovery_curve"]}
    return [_budget(evidence, images, seen) for images, seen in sorted(lengths.items())]


def _budget(evidence: Evidence, images: int, seen: int) -> Budget:
    found = {method: _by_seed(evidence, method, images) for method in evidence.methods}
    top1 = {method: by_seed for method, by_seed in found.items() if by_seed}
    ahead = leads(evidence, top1)
    return Budget(images, seen, top1,
                  {method: mean_over_seeds(evidence, list(by_seed.values())) for method, by_seed in top1.items()},
                  ahead, holm({name: lead.p_value for name, lead in ahead.items()}))


def _by_seed(evidence: Evidence, method: str, images: int) -> BySeed:
    return {cell["seed"]: point["top1_test"] for cell in evidence.of(method) for point in cell["recovery_curve"]
            if point["images"] == images}


@dataclass(frozen=True)
class Standing:
    """``hobs_rspar`` against the baselines after one length of recovery.

    Attributes:
        rival: the baseline with the smallest mean lead.
        lead: over it, points.
        holds: ahead of every baseline, and of the best repaired one by the margin that this length asks for; None
            where that alone is missing: no baseline is repaired, and repair could pass for the criterion.
        how: the numbers behind it in words.
    """

    rival: str
    lead: Difference
    holds: bool | None
    how: str


def standing(budget: Budget, baselines: list[str], repaired: set[str], alpha: float) -> Standing | None:
    """How ``hobs_rspar`` stands after this recovery; None where no baseline shares two seeds with it.

    Args:
        budget: the length of recovery.
        baselines: methods to be ahead of.
        repaired: methods whose plans ask for repair.
        alpha: level of the adjusted p-values.
    """
    rivals = sorted((name for name in baselines if name in budget.leads),
                    key=lambda name: budget.leads[name].interval.value)
    if not rivals:
        return None
    lead, largest = budget.leads[rivals[0]], max(budget.adjusted[name] for name in rivals)
    holds = lead.interval.value > 0 and largest < alpha
    how = (f"smallest lead {lead.interval.value:.2f} over {rivals[0]} of {len(rivals)} baselines, largest adjusted "
           f"p = {largest:.3g}")
    margin, best = MARGINS.get(budget.images), next((name for name in rivals if name in repaired), None)
    if best is None:
        holds = None if holds else False
        how += ", no repaired control (random_repair, l1_repair) among them"
    elif margin is not None:
        least = budget.leads[best].interval
        holds = holds and least.lo >= margin
        how += f", lead over the best repaired one ({best}) from {least.lo:.2f}, goal {margin:g}"
        ceiling = budget.accuracy.get(REFERENCE)
        if ceiling is not None and budget.accuracy[best].value + margin > ceiling.value:
            how += f", which would be more than {REFERENCE} has ({ceiling.value:.2f})"
    return Standing(rivals[0], lead, holds, how.replace("-", "−"))

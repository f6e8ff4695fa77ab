"""Methods ranked within every seed: Friedman's test and Nemenyi's critical difference (Demsar, JMLR 2006)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from hobs_rspar.evidence.summary import Summary

FEWEST = 10  # blocks; below, the distributions that both tests assume are not reached


@dataclass(frozen=True)
class Ranks:
    """Average ranks, 1 the most accurate.

    Attributes:
        average: method to its mean rank over the blocks, the best first.
        blocks: seeds that all methods have.
        p_value: of Friedman's test that all methods are alike.
        critical: difference of two average ranks that Nemenyi's test needs.
    """

    average: dict[str, float]
    blocks: int
    p_value: float
    critical: float

    @property
    def cliques(self) -> list[tuple[str, str]]:
        """First and last method of every largest run that the critical difference does not tell apart."""
        names, places = list(self.average), list(self.average.values())
        runs = [(start, max(end for end in range(start, len(names)) if places[end] - places[start] < self.critical))
                for start in range(len(names))]
        longest = [(start, end) for start, end in runs if end > start
                   and not any(a <= start and end <= b and (a, b) != (start, end) for a, b in runs)]
        return [(names[start], names[end]) for start, end in longest]


def ranked(summary: Summary, alpha: float) -> Ranks | str:
    """The ranks of all methods over the seeds that all have, or why there are none."""
    methods = summary.methods
    seeds = sorted(set.intersection(*(set(method.top1) for method in methods.values())))
    if len(methods) < 3:
        return "ranks compare three methods or more"
    if len(seeds) < FEWEST:
        return f"all methods share {len(seeds)} seeds; {FEWEST} would do"
    values = np.array([[method.top1[seed] for seed in seeds] for method in methods.values()])
    average = stats.rankdata(-values, axis=0).mean(1)
    places = dict(sorted(zip(methods, average.tolist()), key=lambda item: item[1]))
    return Ranks(places, len(seeds), float(stats.friedmanchisquare(*values).pvalue),
                 critical_difference(len(methods), len(seeds), alpha))


def critical_difference(methods: int, blocks: int, alpha: float) -> float:
    """Nemenyi's: the studentised range over sqrt(2), times the standard error of a difference of average ranks."""
    quantile = stats.studentized_range.ppf(1 - alpha, methods, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * blocks)))

"""Dynamic programming on a separable model of the reward, then local search on the reward itself.

The model is a sum of one curve per group, measured around the best allocation so far; on a separable reward it is
exact. MACs are products of the widths of coupled groups, so they are linear only where no two neighbours vary at once:
a set of groups (in a ResNet the residual streams) is held fixed while a multiple-choice knapsack allocates the others
exactly, and the fixed widths are improved by pattern search around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hobs_rspar.allocation import local_search
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Trial

BINS = 500  # of the MACs that the knapsack hands out; costs are rounded up to whole bins
STEPS = (-8, -4, -2, -1, 1, 2, 4, 8)  # of the pattern search, in entries of a group's list of widths


@dataclass(frozen=True)
class Curve:
    """One group's widths, ascending, and what each adds to the reward."""

    widths: np.ndarray
    values: np.ndarray


def search(trial: Trial, generator: np.random.Generator) -> None:
    """Models the reward and solves the model while that helps and half the evaluations remain; then local search."""
    improved = True
    while improved and trial.progress < 0.5:
        before, curves = trial.score_of_best, _measure(trial)
        trial.score(trial.space.complete(solve(trial.space, curves)[None].astype(float)))
        improved = trial.score_of_best > before
    local_search.search(trial, generator)


def _measure(trial: Trial) -> list[Curve]:
    """Curves around the best allocation; as many widths per group as a third of the remaining evaluations allow."""
    space, base = trial.space, trial.best
    most = max(2, trial.left // (3 * len(base)))
    curves = []
    for g, (low, size) in enumerate(zip(space.low, space.sizes)):
        widths = np.unique(np.rint(np.linspace(low, size, min(most, size - low + 1))).astype(int))
        options = np.repeat(base[None], len(widths), 0)
        options[:, g] = widths
        curves.append(Curve(widths, trial.score(options) - trial.score_of_best))
    return curves


def solve(space: Space, curves: list[Curve]) -> np.ndarray:
    """Widths [groups] with the highest sum of values that cost at most the budget, to the precision of the bins."""
    fixed = coupled(space)
    nearest = [int(np.abs(curve.widths - width).argmin()) for curve, width in zip(curves, space.uniform)]
    best, value = _filled(space, curves, fixed, nearest)
    improved = True
    while improved:
        improved = False
        for g in fixed:
            for step in STEPS:
                index = list(best)
                index[g] = min(max(best[g] + step, 0), len(curves[g].widths) - 1)
                found, worth = _filled(space, curves, fixed, index)
                if worth > value:
                    best, value, improved = found, worth, True
    return np.array([curve.widths[i] for curve, i in zip(curves, best)])


def coupled(space: Space) -> list[int]:
    """Groups that, held fixed, leave MACs a sum over the others: a greedy vertex cover of the pairs that multiply."""
    pairs = space.groups.polynomial[1] != 0
    np.fill_diagonal(pairs, False)
    pairs[space.low == space.sizes] = pairs[:, space.low == space.sizes] = False
    fixed = []
    while pairs.any():
        fixed.append(int(pairs.sum(1).argmax()))
        pairs[fixed[-1]] = pairs[:, fixed[-1]] = False
    return fixed


def _filled(space: Space, curves: list[Curve], fixed: list[int], index: list[int]) -> tuple[list[int], float]:
    """The best entries of all groups, those of the fixed ones given, and their value; -inf where nothing fits."""
    free = [g for g in range(len(curves)) if g not in fixed]
    base = space.low.copy()
    base[fixed] = [curves[g].widths[index[g]] for g in fixed]
    least = float(space.expense.of(base))
    unit = max((space.ceiling - least) / BINS, 1e-9)
    if least > space.ceiling:
        return index, -math.inf
    costs = []
    for g in free:
        options = np.repeat(base[None], len(curves[g].widths), 0)
        options[:, g] = curves[g].widths
        costs.append(np.ceil((space.expense.of(options) - least) / unit - 1e-9).astype(int).clip(0))
    chosen = knapsack([curves[g].values for g in free], costs, BINS)
    found = list(index)
    for g, choice in zip(free, chosen):
        found[g] = choice
    return found, float(sum(curve.values[i] for curve, i in zip(curves, found)))


def knapsack(values: list[np.ndarray], costs: list[np.ndarray], capacity: int) -> list[int]:
    """One entry per item with the highest sum of values whose costs sum to at most ``capacity``.

    Args:
        values: per item the value of each of its entries [entries].
        costs: whole numbers, per item [entries]; some entry of every item costs nothing.
        capacity: a whole number.
    """
    best, picks = np.zeros(capacity + 1), []
    for value, cost in zip(values, costs):
        table = np.full((len(value), capacity + 1), -math.inf)
        for row, worth, price in zip(table, value, cost):
            if price <= capacity:
                row[price:] = best[:capacity + 1 - price] + worth
        picks.append(table.argmax(0))
        best = table.max(0)
    chosen, room = [], capacity
    for pick, cost in zip(reversed(picks), reversed(costs)):
        chosen.append(int(pick[room]))
        room -= int(cost[chosen[-1]])
    return chosen[::-1]

"""A search that measures: what it chooses in the end was pruned, repaired and run on validation images.

That would afford some dozens of allocations. So rounds alternate: a reward by look-up is fitted to the allocations that
were run (allocation/fitted.py); a proposer searches it; what it likes best is run next. Proposers are R-SPAR's agent
(allocation/rspar.py) and local search (allocation/climber.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.fitted import FittedReward
from hobs_rspar.allocation.space import Space
from hobs_rspar.data import Images
from hobs_rspar.progress import bar

SPREAD = 0.2  # standard deviation of the log ratios of the first plans that are run
DRAWN = 4  # random plans for each that is run: about half of them meet the budget, and in small spaces many are equal
FINALISTS = 3


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        widths: of the chosen allocation [groups].
        episodes: what the proposer lived through, one record per policy update; empty where nothing learns.
        measured: one record per allocation that was run on validation images, in order, and after how many updates.
        chosen: how the allocation was chosen, in words.
    """

    widths: np.ndarray
    episodes: list[dict]
    measured: list[dict]
    chosen: str


class Model:
    """What the measured allocations foretell about the others.

    Args:
        environment: has measured some.
        curves: see :func:`hobs_rspar.allocation.fitted.FittedReward`.
        widths: the measured allocations [n, groups].

    Attributes:
        reward: minus the expected log loss, pessimistic.
        dense: accuracy of the dense network, a fraction.
    """

    def __init__(self, environment: PruningEnvironment, curves: Sequence[np.ndarray], widths: np.ndarray):
        seen = [environment.evaluate(row) for row in widths]
        self.dense = environment.dense.accuracy
        drops = self.dense - np.array([found.accuracy for found in seen])
        self.reward = FittedReward(curves, widths, np.array([found.loss for found in seen]))
        score = self.reward.score(widths)
        away = score - score.mean()
        self.slope = min(0.0, away @ drops / max(away @ away, 1e-12))
        self.offset = drops.mean() - self.slope * score.mean()

    def drop(self, widths: np.ndarray) -> np.ndarray:
        """Expected accuracy drop, a fraction [n], of widths [n, groups]; linear in the predicted log loss."""
        return self.offset + self.slope * self.reward.score(widths)


class Proposer(Protocol):
    """Searches a model for allocations that are worth a measurement.

    Attributes:
        records: one per policy update so far.
    """

    records: list[dict]

    def propose(self, model: Model, known: np.ndarray, count: int) -> np.ndarray:
        """Up to ``count`` allocations [n, groups] that are not among the known ones [m, groups]."""


def search(environment: PruningEnvironment, curves: Sequence[np.ndarray], space: Space, proposer: Proposer, options,
           seed: int, finalists: Images) -> Search:
    """Runs the search.

    Args:
        environment: measures allocations.
        curves: predicted loss and relative error of every width, see :func:`hobs_rspar.allocation.fitted.FittedReward`.
        space: allocations that meet the budget.
        proposer: says what to measure after the first round.
        options: ``first``, ``rounds`` and ``measured`` of ``methods.hobs_rspar``.
        seed: of the first allocations.
        finalists: validation images on which the best allocations are compared once more.
    """
    widths = _first(space, options.first, np.random.default_rng(seed))
    updates = [0] * len(widths)
    for _ in bar(range(options.rounds), "search"):
        model = Model(environment, curves, widths)
        widths = np.concatenate([widths, proposer.propose(model, widths, options.measured)])
        updates += [len(proposer.records)] * (len(widths) - len(updates))
    chosen = f"lowest loss on {len(finalists)} validation images among the {FINALISTS} best measured allocations and " \
             "uniform widths"
    return Search(_choose(environment, widths, finalists), proposer.records,
                  _measured(environment, space, widths, updates), chosen)


def _first(space: Space, count: int, generator: np.random.Generator) -> np.ndarray:
    """Uniform widths, and different random ones around them [up to count, groups]."""
    around = space.project(np.exp(generator.normal(0, SPREAD, (DRAWN * count, len(space.sizes)))))
    different = dict.fromkeys(map(tuple, [space.uniform, *around[space.meets(around)]]))
    return np.array(list(different)[:count])


def _measured(environment: PruningEnvironment, space: Space, widths: np.ndarray, updates: list[int]) -> list[dict]:
    found = [environment.evaluate(row) for row in widths]
    return [{"updates": before, "accuracy_drop": environment.dense.accuracy - seen.accuracy, "loss": seen.loss,
             "macs_ratio": float(space.groups.macs(row)) / space.groups.dense_macs,
             "ratios": (row / space.sizes).round(4).tolist()} for before, row, seen in zip(updates, widths, found)]


def _choose(environment: PruningEnvironment, widths: np.ndarray, images: Images) -> np.ndarray:
    """Compares the measured allocations of lowest loss, and uniform widths, on more images."""
    order = np.argsort([environment.evaluate(row).loss for row in widths], kind="stable")[:FINALISTS]
    return min(widths[list(dict.fromkeys([0, *order.tolist()]))], key=lambda row: environment.loss_on(row, images))

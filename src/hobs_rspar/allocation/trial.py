"""One run of a search: what it may spend, what it has seen, and the best so far. The same for every search."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hobs_rspar.allocation.space import Space

PATIENCE = 3  # allocations proposed per allowed evaluation before a search that repeats itself is stopped


class Reward(Protocol):
    def score(self, widths: np.ndarray) -> np.ndarray:
        """What allocations [n, groups] are worth [n]; higher is better."""


class Search(Protocol):
    def __call__(self, trial: Trial, generator: np.random.Generator) -> None:
        """Scores allocations by the trial until it is spent, or nothing is left to try; all choices are drawn."""


class Spent(Exception):
    """The trial's evaluations or seconds are used up."""


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        widths: of the best allocation that meets the budget [groups].
        score: its reward.
        history: every improvement as (different allocations evaluated so far, seconds, score).
        evaluations: different allocations sent to the reward.
        seconds: wall time.
    """

    widths: np.ndarray
    score: float
    history: list[tuple[int, float, float]]
    evaluations: int
    seconds: float


def run(search: Search, reward: Reward, space: Space, evaluations: int, generator: np.random.Generator,
        seconds: float = math.inf) -> Result:
    """The best allocation that a search comes across within what it may spend.

    Args:
        search: ``search`` of a module of this package.
        reward: scores allocations.
        space: to choose from.
        evaluations: different allocations that may be sent to the reward.
        generator: of all random choices.
        seconds: wall time that may pass.
    """
    trial = Trial(reward, space, evaluations, seconds)
    with suppress(Spent):
        search(trial, generator)
    return trial.result()


class Trial:
    """Counts evaluations and remembers the best; begins with uniform widths, which are the first evaluation.

    Args:
        reward: scores allocations.
        space: the allocations that count; others may be evaluated, too, but are never the result.
        evaluations: different allocations that may be sent to the reward.
        seconds: wall time that may pass.

    Attributes:
        best: widths of the best allocation so far [groups].
        score_of_best: its reward.
    """

    def __init__(self, reward: Reward, space: Space, evaluations: int, seconds: float = math.inf):
        self.reward, self.space, self.evaluations, self.seconds = reward, space, evaluations, seconds
        self.started, self.proposed = time.perf_counter(), 0
        self.known: dict[bytes, float] = {}
        self.history: list[tuple[int, float, float]] = []
        self.best, self.score_of_best = space.uniform, -math.inf
        self._evaluate(self.best[None], _keys(self.best[None]))
        self.score_of_uniform = self.score_of_best

    @property
    def left(self) -> int:
        """Evaluations that remain."""
        return self.evaluations - len(self.known)

    @property
    def progress(self) -> float:
        """Share of what may be spent, by whichever limit is nearest; at most 1."""
        passed = time.perf_counter() - self.started
        return min(1.0, max(len(self.known) / self.evaluations, self.proposed / (PATIENCE * self.evaluations),
                            passed / self.seconds))

    def score(self, widths: np.ndarray) -> np.ndarray:
        """Rewards [n] of widths [n, groups]; an allocation seen before costs nothing.

        Raises:
            Spent: a limit is reached; as many as were still allowed have been evaluated.
        """
        keys = _keys(widths)
        fresh = list({key: row for row, key in enumerate(keys) if key not in self.known}.values())
        if rows := fresh[:self.left]:
            self._evaluate(widths[rows], [keys[row] for row in rows])
        self.proposed += len(keys)
        if len(rows) < len(fresh) or self.progress >= 1:
            raise Spent
        return np.array([self.known[key] for key in keys])

    def result(self) -> Result:
        return Result(self.best, self.score_of_best, self.history, len(self.known),
                      time.perf_counter() - self.started)

    def _evaluate(self, widths: np.ndarray, keys: list[bytes]) -> None:
        """Scores new widths and notes every improvement, in order."""
        scores, before = self.reward.score(widths), len(self.known)
        self.known.update(zip(keys, scores.tolist()))
        valid = np.where(self.space.meets(widths), scores, -np.inf)
        highest = np.maximum.accumulate(np.append(self.score_of_best, valid))
        for row in np.flatnonzero(valid > highest[:-1]):
            self.best, self.score_of_best = widths[row].copy(), float(valid[row])
            self.history.append((before + int(row) + 1, time.perf_counter() - self.started, self.score_of_best))


def _keys(widths: np.ndarray) -> list[bytes]:
    """One hashable key per allocation."""
    rows = np.ascontiguousarray(widths, dtype=np.int32)
    return rows.view(np.dtype((np.void, rows.strides[0])))[:, 0].tolist()

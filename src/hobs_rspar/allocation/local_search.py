"""Iterated local search (Lourenço et al. 2003): channels added, taken away or exchanged within the budget."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation.trial import Trial

LONGEST = 3  # channels of one group changed at once: groups differ in MACs per channel, so 1 may be worth 3
BATCH = 16  # neighbours scored before the best of them is taken
KICKS, FARTHEST = 8, 4  # random changes from one local optimum to the next start, and channels in each, at most
IDLE = 10  # starts in a row after which nothing new was found, and the search ends: the space is small


def search(trial: Trial, generator: np.random.Generator) -> None:
    """Climbs from a trial's best allocation, at first uniform widths, then from near the best one and from random ones.

    The generator decides in which order neighbours are tried, and the kicks.
    """
    space = trial.space
    climb(trial, trial.best, generator)
    left, idle = trial.left, 0
    while idle < IDLE:
        kicked = trial.best
        for _ in range(generator.integers(1, KICKS + 1)):
            kicked = space.disturbed(kicked[None], FARTHEST, generator)[0]
        climb(trial, kicked, generator)
        climb(trial, space.project(generator.uniform(space.low / space.sizes, 1)[None])[0], generator)
        left, idle = trial.left, idle + 1 if trial.left == left else 0


def climb(trial: Trial, here: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The local optimum [groups] above an allocation.

    Neighbours are tried in random batches, and the best of a batch is taken as soon as it is better: scoring all of
    them before every step would spend ten times the evaluations.
    """
    score, changes, improved = float(trial.score(here[None])[0]), _changes(len(here)), True
    while improved:
        near, improved = here + changes, False
        near = generator.permutation(near[trial.space.meets(near)])
        for start in range(0, len(near), BATCH):
            options = near[start:start + BATCH]
            scores = trial.score(options)
            if improved := bool(scores.max() > score):
                here, score = options[scores.argmax()], float(scores.max())
                break
    return here


def _changes(count: int) -> np.ndarray:
    """Changes of one group, and exchanges between two, by up to LONGEST channels each [changes, groups]."""
    steps = np.concatenate([length * np.eye(count, dtype=int) for length in range(1, LONGEST + 1)])
    pairs = (steps[:, None] - steps[None]).reshape(-1, count)
    return np.concatenate([steps, -steps, pairs[(pairs > 0).any(1) & (pairs < 0).any(1)]])

"""Simulated annealing (Kirkpatrick et al. 1983) by channels moved between groups."""

from __future__ import annotations

import math

import numpy as np

from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Result, Reward, Trial

WARM = 24  # neighbours of uniform widths whose differences set the first temperature
COLD = 1e-3  # last temperature, relative to the first
LONGEST = 8  # channels moved at once, at most


def allocate(reward: Reward, space: Space, evaluations: int, generator: np.random.Generator,
             seconds: float = math.inf) -> Result:
    """One chain, cooled geometrically over what may be spent.

    Args:
        reward: scores allocations.
        space: to choose from.
        evaluations: different allocations that may be sent to the reward.
        generator: of all random choices.
        seconds: wall time that may pass.
    """
    with Trial(reward, space, evaluations, seconds) as trial:
        here, score = trial.best, trial.score_of_best
        near = trial.score(space.disturbed(np.repeat(here[None], WARM, 0), LONGEST, generator))
        hot = max(float(np.abs(near - score).mean()), 1e-12)
        while True:
            candidate = space.disturbed(here[None], LONGEST, generator)
            found = float(trial.score(candidate)[0])
            temperature = hot * COLD**trial.progress
            if found >= score or generator.random() < math.exp((found - score) / temperature):
                here, score = candidate[0], found
    return trial.result()


"""Random search: independent random ratios, projected on the budget. What every other search must beat."""

from __future__ import annotations

import math

import numpy as np

from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Result, Reward, Trial

BATCH = 64  # allocations drawn and scored at once


def allocate(reward: Reward, space: Space, evaluations: int, generator: np.random.Generator,
             seconds: float = math.inf) -> Result:
    """The best of random allocations.

    Args:
        reward: scores allocations.
        space: to choose from.
        evaluations: different allocations that may be sent to the reward.
        generator: of all random choices.
        seconds: wall time that may pass.
    """
    with Trial(reward, space, evaluations, seconds) as trial:
        while True:
            ratios = generator.uniform(space.low / space.sizes, 1, (BATCH, len(space.sizes)))
            trial.score(space.project(ratios))
    return trial.result()

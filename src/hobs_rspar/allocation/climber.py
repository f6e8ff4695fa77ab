"""Local search on the reward that is fitted to measured allocations: the proposer of ``allocator: local_search``."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation import local_search, trial
from hobs_rspar.allocation.measured_search import Model
from hobs_rspar.allocation.space import Space

EVALUATIONS = 3000  # look-ups for every allocation that is proposed
NEARBY = 4  # channels by which an allocation that was measured already is changed at once, at most
TRIES = 100  # such changes; where all fail, the space has hardly any other allocation


class Climber:
    """Searches the fitted reward anew for every proposal; a proposer of measured_search.

    Args:
        space: allocations that meet the budget.
        seed: of all random choices.

    Attributes:
        records: none, because nothing is learnt from round to round but the reward.
    """

    def __init__(self, space: Space, seed: int):
        self.space, self.generator, self.records = space, np.random.default_rng(seed), []

    def propose(self, model: Model, known: np.ndarray, count: int) -> np.ndarray:
        """Local optima of the reward, or allocations beside them where those were measured before [n, groups]."""
        found = known
        for _ in range(count):
            widths = trial.run(local_search.search, model.reward, self.space, EVALUATIONS, self.generator).widths
            for _ in range(TRIES):
                if self.space.meets(widths[None])[0] and not (found == widths).all(1).any():
                    found = np.concatenate([found, widths[None]])
                    break
                widths = self.space.disturbed(widths[None], NEARBY, self.generator)[0]
        return found[len(known):]

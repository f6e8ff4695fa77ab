"""Random search: independent random ratios, projected on the budget. What every other search must beat."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation.trial import Trial

BATCH = 64  # allocations drawn and scored at once


def search(trial: Trial, generator: np.random.Generator) -> None:
    """The best of random allocations."""
    space = trial.space
    while True:
        ratios = generator.uniform(space.low / space.sizes, 1, (BATCH, len(space.sizes)))
        trial.score(space.project(ratios))

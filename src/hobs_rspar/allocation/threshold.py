"""Global threshold: the channels with the lowest scores of all groups go first, until the budget is met."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hobs_rspar.allocation.space import Space


def threshold_widths(space: Space, scores: list[Tensor]) -> np.ndarray:
    """Kept channels [groups] under one threshold on all scores; no group goes below its floor.

    Args:
        space: budget and floors.
        scores: per group [channels], comparable between groups.
    """
    owner = np.repeat(np.arange(len(space.sizes)), space.sizes)
    flat = np.concatenate([score.numpy() for score in scores])
    order = owner[np.argsort(flat, kind="stable")]
    fewest, most = 0, len(order)
    while fewest < most:  # the smallest number of removals that fits the budget
        middle = (fewest + most) // 2
        fits = space.expense.of(_after(space, order[:middle])) <= space.target
        fewest, most = (fewest, middle) if fits else (middle + 1, most)
    return space.complete(_after(space, order[:fewest])[None].astype(float))[0]


def _after(space: Space, removed: np.ndarray) -> np.ndarray:
    """Widths after removing one channel of each listed group, not below the floors."""
    return np.maximum(space.sizes - np.bincount(removed, minlength=len(space.sizes)), space.low)

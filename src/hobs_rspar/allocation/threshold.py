"""Global threshold: the channels with the lowest scores of all groups go first, until the budget is met."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from hobs_rspar.allocation.budget import TOLERANCE, complete, floors
from hobs_rspar.coupling import Groups


def threshold_widths(groups: Groups, scores: list[Tensor], budget: float, min_ratio: float = 0.0,
                     tolerance: float = TOLERANCE) -> np.ndarray:
    """Kept channels [groups] under one threshold on all scores; no group goes below its floor.

    Args:
        groups: of the dense network.
        scores: per group [channels], comparable between groups.
        budget: kept fraction of the dense MACs.
        min_ratio: floor of every group.
        tolerance: |kept - budget| / budget that counts as met.
    """
    low = floors(groups, min_ratio)
    owner = np.repeat(np.arange(len(groups)), groups.sizes)
    flat = np.concatenate([score.numpy() for score in scores])
    order = owner[np.argsort(flat, kind="stable")]
    fewest, most = 0, len(order)
    while fewest < most:  # the smallest number of removals that fits the budget
        middle = (fewest + most) // 2
        fits = groups.macs(_after(groups, order[:middle], low)) <= budget * groups.dense_macs
        fewest, most = (fewest, middle) if fits else (middle + 1, most)
    return complete(groups, _after(groups, order[:fewest], low).astype(float), budget, low, tolerance)


def _after(groups: Groups, removed: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Widths after removing one channel of each listed group, not below the floors."""
    return np.maximum(groups.sizes - np.bincount(removed, minlength=len(groups)), low)

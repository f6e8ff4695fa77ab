"""Uniform allocation: every group keeps the same fraction of its channels."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation.budget import TOLERANCE, project
from hobs_rspar.coupling import Groups


def uniform_widths(groups: Groups, budget: float, min_ratio: float = 0.0, tolerance: float = TOLERANCE) -> np.ndarray:
    """Kept channels [groups] at one common ratio that meets ``budget`` (kept fraction of the dense MACs)."""
    return project(groups, np.ones(len(groups)), budget, min_ratio, tolerance)

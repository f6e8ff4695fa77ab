"""Widths that the hardware likes: multiples of a number of channels, without spending more than before."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation.space import Space
from hobs_rspar.errors import UserError


def in_multiples(space: Space, widths: np.ndarray) -> np.ndarray:
    """The widths in multiples of ``space.round_to`` near to ``widths`` that spend no more than those or the budget.

    Every width is rounded to the nearest multiple. While they spend too much, the group that is farthest above its own
    width gives one multiple back; then, while there is room for one, the group that is farthest below gets it. A full
    width counts as a multiple; whole groups stay whole.

    Args:
        space: budget, floors and sizes.
        widths: kept channels [groups].

    Raises:
        UserError: one multiple for every group is more than the budget.
    """
    multiple, sizes = space.round_to, space.sizes
    if multiple == 1:
        return widths
    least = np.minimum(sizes, -(-space.low // multiple) * multiple)
    limit = max(space.target, float(space.expense.of(widths)))
    if space.expense.of(least) > limit:
        raise UserError(f"budget {space.budget:g}x {space.expense.unit} cannot be met in multiples of {multiple} "
                        f"channels: the fewest that allocation.min_ratio allows keep {space.spent(least):.4f}x; lower "
                        "allocation.round_to or raise the budget")
    found = np.clip(np.rint(widths / multiple).astype(int) * multiple, least, sizes)
    while space.expense.of(found) > limit:
        found = np.where(_farthest(found - widths, sizes, found > least), _below(found, multiple, least), found)
    while (room := _room(space, found, limit)).any():
        found = np.where(_farthest(widths - found, sizes, room), np.minimum(found + multiple, sizes), found)
    return found


def _below(widths: np.ndarray, multiple: int, least: np.ndarray) -> np.ndarray:
    """The next multiple below each width [groups]."""
    return np.maximum(least, (widths - 1) // multiple * multiple)


def _room(space: Space, widths: np.ndarray, limit: float) -> np.ndarray:
    """Which groups may have one multiple more within the limit [groups]."""
    more = np.minimum(widths + space.round_to, space.sizes)
    options = np.where(np.eye(len(widths), dtype=bool), more, widths)
    return (more > widths) & (space.expense.of(options) <= limit)


def _farthest(distance: np.ndarray, sizes: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Marks the one group with the largest distance, as a share of its size, among some [groups]."""
    return np.arange(len(sizes)) == np.where(among, distance / sizes, -np.inf).argmax()

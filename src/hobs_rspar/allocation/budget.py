"""Meeting a budget exactly: floors, projection of ratios, and the shared completion by single channels."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError

if TYPE_CHECKING:
    from hobs_rspar.allocation.space import Space

SMALL = 300_000  # allocations of a network small enough to look at all of them
BLOCK = 1024  # allocations completed at once: bounds the memory for networks with many groups
LEAST = 1e-9  # of the budget: what a step must come nearer, or rounding errors of a latency would go in circles
DECIMALS = 9  # distances that differ by less are equal, and the gap to the budget decides


def floors(groups: Groups, min_ratio: float) -> np.ndarray:
    """Fewest channels each group may keep [groups]: a fraction, at least one; all of a protected group."""
    least = np.maximum(1, np.ceil(min_ratio * groups.sizes - 1e-9).astype(int))
    return np.where([bool(group.protected) for group in groups], groups.sizes, least)


def project(space: Space, ratios: np.ndarray) -> np.ndarray:
    """Widths in proportion to ratios that meet the budget.

    Args:
        space: budget and floors.
        ratios: wanted kept ratios [n, groups], any positive scale.

    Returns:
        Kept channels [n, groups].

    Raises:
        UserError: the floors alone cost more than the budget, or no widths come within the tolerance.
    """
    spent, sizes, low = space.expense.of, space.sizes, space.low
    if spent(low) > space.ceiling:
        whole = "; ".join(f"{group.name}: {group.protected}" for group in space.groups if group.protected) or "none"
        raise UserError(f"budget {space.budget:g}x {space.expense.unit} cannot be met: with every group at its floor "
                        f"(allocation.min_ratio {space.min_ratio:g}) {space.spent(low):.4f}x remain; raise the budget "
                        f"or lower allocation.min_ratio. Groups that are kept whole: {whole}")
    below, above = np.zeros((len(ratios), 1)), 1.0 / np.maximum(ratios.min(1, keepdims=True), 1e-9)
    for _ in range(60):  # bisection on the common scale, on real-valued widths
        middle = (below + above) / 2
        over = spent(np.clip(middle * ratios * sizes, low, sizes))[:, None] > space.target
        below, above = np.where(over, below, middle), np.where(over, middle, above)
    return complete(space, np.clip(below * ratios * sizes, low, sizes))


def complete(space: Space, wanted: np.ndarray) -> np.ndarray:
    """Rounds real-valued widths and adds or takes back single channels until the budget is met.

    Every step takes the change (one channel, or one channel moved between two groups) that comes nearest to
    ``wanted`` among those that reduce the distance to the budget, preferring those that meet it.

    Args:
        space: budget and floors.
        wanted: [n, groups].

    Returns:
        Kept channels [n, groups].
    """
    widths = np.clip(np.rint(wanted), space.low, space.sizes).astype(int)
    unmet = np.arange(len(widths))
    while len(unmet := unmet[~space.spends(widths[unmet])]):
        for rows in np.array_split(unmet, -(-len(unmet) // BLOCK)):
            widths[rows] = _step(space, widths[rows], wanted[rows])
    return widths


def _step(space: Space, widths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The best change of each of some widths [n, groups]; all other widths where no single change helps."""
    sizes, (changes, up, down) = space.sizes, moves(len(space.sizes))
    gaps = np.abs(space.expense.after(widths, changes) - space.target)
    nearer = gaps < np.abs(space.expense.of(widths) - space.target)[:, None] - LEAST * space.target
    nearer &= (widths == sizes) @ up + (widths == space.low) @ down == 0
    before = np.abs(widths - wanted)
    distance = ((np.abs(widths + 1 - wanted) - before) / sizes) @ up
    distance += ((np.abs(widths - 1 - wanted) - before) / sizes) @ down
    unmet = gaps > space.tolerance * space.target
    best = _first(np.where(nearer, distance + 1e3 * unmet, np.inf), gaps)
    changed = widths + changes[best]
    for row in np.flatnonzero(~nearer.any(1)):
        changed[row] = _jump(space, widths[row], wanted[row])
    return changed


def _first(distance: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Index of the smallest distance in every row [n]; of equal ones (up to rounding) the one with the least gap."""
    distance = distance.round(DECIMALS)
    return np.where(distance == distance.min(-1, keepdims=True), gaps, np.inf).argmin(-1)


def _jump(space: Space, widths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The widths of a small network nearest to ``wanted`` among all that are nearer to the budget."""
    if np.prod(space.sizes - space.low + 1.0) <= SMALL:
        options = _every(space.low, space.sizes)
        gaps = np.abs(space.expense.of(options) - space.target)
        nearer = gaps < np.abs(space.expense.of(widths) - space.target) - LEAST * space.target
        if nearer.any():
            distance = np.abs((options[nearer] - wanted) / space.sizes).sum(1)
            return options[nearer][_first(distance + 1e3 * (gaps[nearer] > space.tolerance * space.target),
                                          gaps[nearer])]
    raise UserError(f"budget {space.budget:g}x {space.expense.unit} cannot be met within {space.tolerance:.1%}: the "
                    f"nearest widths keep {space.spent(widths):.4f}x (group "
                    f"{space.groups[int(np.argmax(widths - wanted))].name} is the coarsest); change the budget")


def _every(low: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """All widths between the floors and the full sizes [n, groups]."""
    return np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, sizes)), indexing="ij"), -1).reshape(
        -1, len(sizes))


@cache
def moves(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All single-channel changes, and all moves of one channel between two groups.

    Returns:
        Changes [moves, groups], and which groups gain and which lose a channel in each [groups, moves] (0.0 or 1.0).
    """
    one = np.eye(count, dtype=int)
    pairs = (one[:, None] - one[None]).reshape(-1, count)
    changes = np.concatenate([one, -one, pairs[np.abs(pairs).sum(1) > 0]])
    return changes, (changes > 0).T.astype(float), (changes < 0).T.astype(float)

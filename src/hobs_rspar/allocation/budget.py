"""Meeting a budget exactly: floors, projection of ratios, and the shared completion by single channels."""

from __future__ import annotations

from functools import cache

import numpy as np

from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError

TOLERANCE = 0.01
SMALL = 300_000  # allocations of a network small enough to look at all of them
BLOCK = 1024  # allocations completed at once: bounds the memory for networks with many groups
DECIMALS = 9  # distances that differ by less are equal, and the gap to the budget decides


def floors(groups: Groups, min_ratio: float) -> np.ndarray:
    """Fewest channels each group may keep [groups]: a fraction, at least one; all of a protected group."""
    least = np.maximum(1, np.ceil(min_ratio * groups.sizes - 1e-9).astype(int))
    return np.where([bool(group.protected) for group in groups], groups.sizes, least)


def project(groups: Groups, ratios: np.ndarray, budget: float, min_ratio: float,
            tolerance: float = TOLERANCE) -> np.ndarray:
    """Widths in proportion to ``ratios`` that meet the budget.

    Args:
        groups: of the dense network.
        ratios: wanted kept ratios [groups], any positive scale.
        budget: kept fraction of the dense MACs.
        min_ratio: floor of every group.
        tolerance: |kept - budget| / budget that counts as met.

    Returns:
        Kept channels [groups].

    Raises:
        UserError: the floors alone cost more than the budget, or no widths come within the tolerance.
    """
    return project_many(groups, np.asarray(ratios)[None], budget, min_ratio, tolerance)[0]


def project_many(groups: Groups, ratios: np.ndarray, budget: float, min_ratio: float,
                 tolerance: float = TOLERANCE) -> np.ndarray:
    """:func:`project` of many ratios [n, groups] at once: kept channels [n, groups]."""
    sizes, low = groups.sizes, floors(groups, min_ratio)
    target = budget * groups.dense_macs
    if groups.macs(low) > target * (1 + tolerance):
        whole = "; ".join(f"{group.name}: {group.protected}" for group in groups if group.protected) or "none"
        raise UserError(f"budget {budget:g}x MACs cannot be met: with every group at its floor (allocation.min_ratio "
                        f"{min_ratio:g}) {groups.macs(low) / groups.dense_macs:.4f}x remain; raise the budget or lower "
                        f"allocation.min_ratio. Groups that are kept whole: {whole}")
    below, above = np.zeros((len(ratios), 1)), 1.0 / np.maximum(ratios.min(1, keepdims=True), 1e-9)
    for _ in range(60):  # bisection on the common scale, on real-valued widths
        middle = (below + above) / 2
        over = groups.macs(np.clip(middle * ratios * sizes, low, sizes))[:, None] > target
        below, above = np.where(over, below, middle), np.where(over, middle, above)
    return complete_many(groups, np.clip(below * ratios * sizes, low, sizes), budget, low, tolerance)


def complete(groups: Groups, wanted: np.ndarray, budget: float, low: np.ndarray,
             tolerance: float = TOLERANCE) -> np.ndarray:
    """Rounds real-valued widths and adds or takes back single channels until the budget is met.

    Every step takes the change (one channel, or one channel moved between two groups) that comes nearest to
    ``wanted`` among those that reduce the distance to the budget, preferring those that meet it.
    """
    return complete_many(groups, np.asarray(wanted)[None], budget, low, tolerance)[0]


def complete_many(groups: Groups, wanted: np.ndarray, budget: float, low: np.ndarray,
                  tolerance: float = TOLERANCE) -> np.ndarray:
    """:func:`complete` of many wanted widths [n, groups] at once: kept channels [n, groups]."""
    target = budget * groups.dense_macs
    widths = np.clip(np.rint(wanted), low, groups.sizes).astype(int)
    unmet = np.arange(len(widths))
    while len(unmet := unmet[np.abs(groups.macs(widths[unmet]) - target) > tolerance * target]):
        for rows in np.array_split(unmet, -(-len(unmet) // BLOCK)):
            widths[rows] = _step(groups, widths[rows], wanted[rows], target, low, tolerance)
    return widths


def _step(groups: Groups, widths: np.ndarray, wanted: np.ndarray, target: float, low: np.ndarray,
          tolerance: float) -> np.ndarray:
    """The best change of each of some widths [n, groups]; all other widths where no single change helps."""
    changes, up, down = moves(len(low))
    gaps = np.abs(groups.macs_after(widths, changes) - target)
    nearer = gaps < np.abs(groups.macs(widths) - target)[:, None]
    nearer &= (widths == groups.sizes) @ up + (widths == low) @ down == 0
    before = np.abs(widths - wanted)
    distance = ((np.abs(widths + 1 - wanted) - before) / groups.sizes) @ up
    distance += ((np.abs(widths - 1 - wanted) - before) / groups.sizes) @ down
    best = _first(np.where(nearer, distance + 1e3 * (gaps > tolerance * target), np.inf), gaps)
    changed = widths + changes[best]
    for row in np.flatnonzero(~nearer.any(1)):
        changed[row] = _jump(groups, widths[row], wanted[row], target, low, tolerance)
    return changed


def _first(distance: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Index of the smallest distance in every row [n]; of equal ones (up to rounding) the one with the least gap."""
    distance = distance.round(DECIMALS)
    return np.where(distance == distance.min(-1, keepdims=True), gaps, np.inf).argmin(-1)


def _jump(groups: Groups, widths: np.ndarray, wanted: np.ndarray, target: float, low: np.ndarray,
          tolerance: float) -> np.ndarray:
    """The widths of a small network nearest to ``wanted`` among all that are nearer to the budget."""
    if np.prod(groups.sizes - low + 1.0) <= SMALL:
        options = _every(low, groups.sizes)
        gaps = np.abs(groups.macs(options) - target)
        nearer = gaps < abs(int(groups.macs(widths)) - target)
        if nearer.any():
            distance = np.abs((options[nearer] - wanted) / groups.sizes).sum(1)
            return options[nearer][_first(distance + 1e3 * (gaps[nearer] > tolerance * target), gaps[nearer])]
    raise UserError(f"budget {target / groups.dense_macs:g}x MACs cannot be met within {tolerance:.1%}: the nearest "
                    f"widths keep {groups.macs(widths) / groups.dense_macs:.4f}x (group "
                    f"{groups[int(np.argmax(widths - wanted))].name} is the coarsest); change the budget")


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

"""Meeting a budget exactly: floors, projection of ratios, and the shared completion by single channels."""

from __future__ import annotations

import numpy as np

from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError

TOLERANCE = 0.01
SMALL = 300_000  # allocations of a network small enough to look at all of them


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
    sizes, low = groups.sizes, floors(groups, min_ratio)
    target = budget * groups.dense_macs
    if groups.macs(low) > target * (1 + tolerance):
        whole = "; ".join(f"{group.name}: {group.protected}" for group in groups if group.protected) or "none"
        raise UserError(f"budget {budget:g}x MACs cannot be met: with every group at its floor (allocation.min_ratio "
                        f"{min_ratio:g}) {groups.macs(low) / groups.dense_macs:.4f}x remain; raise the budget or lower "
                        f"allocation.min_ratio. Groups that are kept whole: {whole}")
    below, above = 0.0, 1.0 / max(ratios.min(), 1e-9)
    for _ in range(60):  # bisection on the common scale, on real-valued widths
        middle = (below + above) / 2
        wanted = np.clip(middle * ratios * sizes, low, sizes)
        below, above = (below, middle) if groups.macs(wanted) > target else (middle, above)
    return complete(groups, np.clip(below * ratios * sizes, low, sizes), budget, low, tolerance)


def complete(groups: Groups, wanted: np.ndarray, budget: float, low: np.ndarray,
             tolerance: float = TOLERANCE) -> np.ndarray:
    """Rounds real-valued widths and adds or takes back single channels until the budget is met.

    Every step takes the change (one channel, or one channel moved between two groups) that comes nearest to
    ``wanted`` among those that reduce the distance to the budget, preferring those that meet it.
    """
    sizes, target = groups.sizes, budget * groups.dense_macs
    widths = np.clip(np.rint(wanted), low, sizes).astype(int)
    moves = _moves(len(sizes))
    while (gap := abs(int(groups.macs(widths)) - target)) > tolerance * target:
        options, gaps = _nearer(groups, np.clip(widths + moves, low, sizes), target, gap)
        if not len(options) and np.prod(sizes - low + 1.0) <= SMALL:
            options, gaps = _nearer(groups, _every(low, sizes), target, gap)
        if not len(options):
            raise UserError(f"budget {budget:g}x MACs cannot be met within {tolerance:.1%}: the nearest widths keep "
                            f"{groups.macs(widths) / groups.dense_macs:.4f}x (group "
                            f"{groups[int(np.argmax(widths - wanted))].name} is the coarsest); change the budget")
        distance = np.abs((options - wanted) / sizes).sum(1) + 1e3 * (gaps > tolerance * target)
        widths = options[np.lexsort((gaps, distance))[0]]
    return widths


def _nearer(groups: Groups, options: np.ndarray, target: float, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Those of some widths [n, groups] that are nearer to the budget than ``gap``, and their distances to it."""
    gaps = np.abs(groups.macs(options) - target)
    return options[gaps < gap], gaps[gaps < gap]


def _every(low: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """All widths between the floors and the full sizes [n, groups]."""
    return np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(low, sizes)), indexing="ij"), -1).reshape(
        -1, len(sizes))


def _moves(count: int) -> np.ndarray:
    """All single-channel changes, and all moves of one channel between two groups [moves, groups]."""
    one = np.eye(count, dtype=int)
    pairs = (one[:, None] - one[None]).reshape(-1, count)
    return np.concatenate([one, -one, pairs[np.abs(pairs).sum(1) > 0]])

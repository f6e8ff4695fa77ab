"""Rewards that need no forward pass: what an allocation is worth, from tables made once.

Channels have a fixed order, so an allocation's mask is a prefix of each group's order, and everything that a
second-order model of the damage needs is a look-up by width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hobs_rspar.curvature.joint import JointModel
from hobs_rspar.errors import UserError

MOST = 16_384  # widths of all groups together: the joint model's table has the square of it as float64, 2 GiB


class SeparableReward:
    """Minus the sum over groups of an error that depends on the group's own width only.

    Args:
        curves: per group the error of every width, from 0 to all of its channels [channels + 1].
    """

    def __init__(self, curves: Sequence[np.ndarray]):
        self.offsets = _offsets(curves)
        self.table = np.concatenate(curves).astype(np.float64)

    @classmethod
    def from_relative(cls, relative: Sequence[np.ndarray]) -> SeparableReward:
        """Rewards minus the sum of relative output errors.

        Args:
            relative: per group the cumulative error after each elimination [channels]: entry k - 1 belongs to k
                removed channels.
        """
        return cls([np.append(0.0, errors)[::-1] for errors in relative])

    def score(self, widths: np.ndarray) -> np.ndarray:
        """Rewards [n] of kept channels [n, groups]."""
        return -self.table[widths + self.offsets].sum(1)


class JointReward:
    """Minus the change of loss in the joint second-order model of all gates.

    The channels that a width removes are the first ones of the group's order. So the second-order term between two
    groups depends on their two widths alone; with the Hessian summed up along both axes once, an allocation costs
    groups (groups + 1) / 2 look-ups.

    Args:
        model: of all gates (curvature/joint.py).
        order: per group its channels, the first to go first.

    Raises:
        UserError: the table of products would not fit into memory.
    """

    def __init__(self, model: JointModel, order: Sequence[np.ndarray]):
        self.offsets = _offsets([np.append(channels, 0) for channels in order])
        total = len(np.concatenate(order)) + len(order)
        if total > MOST:
            raise UserError(f"the joint model of {total - len(order)} channels needs {total**2 * 8 / 2**30:.0f} GiB; "
                            f"at most {MOST - len(order)} channels are supported: use the separable reward")
        slope = _prefixes(model.first.double().numpy()[None], order)[0]
        pairs = _prefixes(_prefixes(model.hessian.double().numpy(), order).T, order)
        self.single = -slope + 0.5 * pairs.diagonal()
        self.products, self.total = pairs.ravel(), total
        self.pairs = np.triu_indices(len(order), 1)

    def score(self, widths: np.ndarray) -> np.ndarray:
        """Rewards [n] of kept channels [n, groups]."""
        index = widths + self.offsets
        first, second = self.pairs
        joint = self.products.take(index[:, first] * self.total + index[:, second])
        return -(self.single.take(index).sum(1) + joint.sum(1))


def _offsets(entries: Sequence[np.ndarray]) -> np.ndarray:
    """Where each group's entries begin in their concatenation [groups]."""
    return np.cumsum([0, *(len(part) for part in entries[:-1])])


def _prefixes(rows: np.ndarray, order: Sequence[np.ndarray]) -> np.ndarray:
    """Sums of the removed channels' columns at every width, 0 to all of a group [N, channels + groups]."""
    starts = np.cumsum([0, *(len(channels) for channels in order)])
    parts = []
    for start, channels in zip(starts, order):
        sums = rows[:, start + channels].cumsum(1, dtype=np.float64)
        parts.append(np.concatenate([np.zeros((len(rows), 1)), sums], 1)[:, ::-1])
    return np.concatenate(parts, 1)

"""Which channels hang together: a graph over the indices of every parameter's and buffer's axes.

A node is one index of one axis of one tensor, such as the fifth filter of ``conv1.weight`` (axis 0) or its second input
(axis 1). Nodes that must be removed together are united. Nodes that cannot be removed are pinned, with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or buffer, whose indices are the nodes ``first`` to ``first + size - 1``."""

    tensor: str
    axis: int
    first: int
    size: int


class Channels:
    """Nodes, what is united, and what is pinned.

    Attributes:
        axes: every axis that was asked for: (tensor, axis) -> :class:`Axis`.
    """

    def __init__(self):
        self.axes: dict[tuple[str, int], Axis] = {}
        self._count = 0
        self._pairs: list[Tensor] = []
        self._pins: list[tuple[Tensor, str]] = []

    def nodes(self, tensor: str, axis: int, size: int) -> Tensor:
        """The nodes of an axis [size]."""
        key = tensor, axis
        if key not in self.axes:
            self.axes[key] = Axis(tensor, axis, self._count, size)
            self._count += size
        first = self.axes[key].first
        return torch.arange(first, first + size)

    def unite(self, one: Tensor, other: Tensor) -> None:
        """Unites nodes pair by pair; negative numbers are no nodes."""
        pairs = torch.stack(torch.broadcast_tensors(one, other)).flatten(1)
        self._pairs.append(pairs[:, (pairs >= 0).all(0) & (pairs[0] != pairs[1])])

    def pin(self, nodes: Tensor, reason: str) -> None:
        """Says why nodes cannot be removed; negative numbers are no nodes."""
        self._pins.append((torch.unique(nodes[nodes >= 0]), reason))

    def sets(self) -> np.ndarray:
        """The number of the set that each node is in [nodes]."""
        one, other = torch.cat([torch.empty(2, 0, dtype=torch.long), *self._pairs], 1).numpy()
        graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(self._count, self._count))
        return connected_components(graph, directed=False)[1]

    def reasons(self) -> dict[int, list[str]]:
        """Set -> why it cannot be removed, in order; sets that may be removed are left out."""
        found, sets = {}, self.sets()
        for nodes, reason in self._pins:
            for number in np.unique(sets[nodes.numpy()]).tolist():
                found.setdefault(number, {})[reason] = None
        return {number: list(reasons) for number, reasons in found.items()}

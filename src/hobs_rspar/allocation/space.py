"""The allocations that a search may choose from: widths between the floors and the full sizes that meet a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hobs_rspar.allocation.budget import TOLERANCE, complete_many, floors, moves, project_many
from hobs_rspar.coupling import Groups


@dataclass(frozen=True)
class Space:
    """A budget and its floors.

    Attributes:
        groups: of the dense network.
        budget: kept fraction of the dense MACs.
        min_ratio: floor of every group.
        tolerance: |kept - budget| / budget that counts as met.
    """

    groups: Groups
    budget: float
    min_ratio: float
    tolerance: float = TOLERANCE

    @cached_property
    def sizes(self) -> np.ndarray:
        return self.groups.sizes

    @cached_property
    def low(self) -> np.ndarray:
        """Fewest channels [groups]; all of them where the budget asks for nothing to be removed."""
        return self.sizes if self.budget >= 1 else floors(self.groups, self.min_ratio)

    @cached_property
    def uniform(self) -> np.ndarray:
        """Widths [groups] at one common ratio."""
        return self.project(np.ones((1, len(self.groups))))[0]

    @property
    def ceiling(self) -> float:
        """The most MACs that still meet the budget."""
        return self.budget * (1 + self.tolerance) * self.groups.dense_macs

    def project(self, ratios: np.ndarray) -> np.ndarray:
        """Widths [n, groups] in proportion to ratios [n, groups]."""
        return project_many(self.groups, ratios, self.budget, self.min_ratio, self.tolerance)

    def complete(self, wanted: np.ndarray) -> np.ndarray:
        """Widths [n, groups] near to real-valued ones [n, groups]."""
        return complete_many(self.groups, wanted, self.budget, self.low, self.tolerance)

    def disturbed(self, widths: np.ndarray, longest: int, generator: np.random.Generator) -> np.ndarray:
        """Widths [n, groups] after one random change each of up to ``longest`` channels, completed.

        A change adds, removes or exchanges channels; noise decides which other groups make up for the budget.
        """
        changes = moves(len(self.sizes))[0]
        steps = changes[generator.integers(len(changes), size=len(widths))]
        steps = steps * generator.integers(1, longest + 1, (len(widths), 1))
        noise = generator.uniform(-0.49, 0.49, widths.shape)  # below half a channel: it does not change the rounding
        return self.complete(np.clip(widths + steps, self.low, self.sizes) + noise)

    def raw_macs(self, ratios: np.ndarray) -> np.ndarray:
        """MACs [n] of ratios [n, groups] as they are, before projection."""
        return self.groups.macs(np.maximum(1, np.rint(ratios * self.sizes)))

    def overshoot(self, ratios: np.ndarray) -> np.ndarray:
        """How far ratios [n, groups] are above the budget before projection, as a fraction of it, at least 0 [n]."""
        return np.maximum(0, self.raw_macs(ratios) / (self.budget * self.groups.dense_macs) - 1)

    def meets(self, widths: np.ndarray) -> np.ndarray:
        """Whether widths [n, groups] lie in the space [n]."""
        target = self.budget * self.groups.dense_macs
        met = np.abs(self.groups.macs(widths) - target) <= self.tolerance * target
        return met & ((widths >= self.low) & (widths <= self.sizes)).all(1)

"""The allocations that a search may choose from: widths between the floors and the full sizes that meet a budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from hobs_rspar.allocation.budget import complete, floors, moves, project
from hobs_rspar.allocation.expense import Expense, Macs
from hobs_rspar.coupling import Groups


@dataclass(frozen=True)
class Space:
    """A budget and its floors.

    Attributes:
        groups: of the dense network.
        budget: kept fraction of what the dense network spends.
        min_ratio: floor of every group.
        tolerance: |kept - budget| / budget that counts as met.
        expense: what is spent; None: MACs.
    """

    groups: Groups
    budget: float
    min_ratio: float = 0.0
    tolerance: float = 0.01
    expense: Expense = field(default=None)

    def __post_init__(self):
        if self.expense is None:
            object.__setattr__(self, "expense", Macs(self.groups))

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
    def target(self) -> float:
        """What should be spent."""
        return self.budget * self.expense.dense

    @property
    def ceiling(self) -> float:
        """The most that still meets the budget."""
        return self.target * (1 + self.tolerance)

    def spent(self, widths: np.ndarray) -> np.ndarray:
        """What widths [..., groups] spend, as a fraction of the dense network [...]."""
        return self.expense.of(widths) / self.expense.dense

    def spends(self, widths: np.ndarray) -> np.ndarray:
        """Whether widths [n, groups] spend the budget, within the tolerance [n]."""
        return np.abs(self.expense.of(widths) - self.target) <= self.tolerance * self.target

    def project(self, ratios: np.ndarray) -> np.ndarray:
        """Widths [n, groups] in proportion to ratios [n, groups]."""
        return project(self, ratios)

    def complete(self, wanted: np.ndarray) -> np.ndarray:
        """Widths [n, groups] near to real-valued ones [n, groups]."""
        return complete(self, wanted)

    def disturbed(self, widths: np.ndarray, longest: int, generator: np.random.Generator) -> np.ndarray:
        """Widths [n, groups] after one random change each of up to ``longest`` channels, completed.

        A change adds, removes or exchanges channels; noise decides which other groups make up for the budget.
        """
        changes = moves(len(self.sizes))[0]
        steps = changes[generator.integers(len(changes), size=len(widths))]
        steps = steps * generator.integers(1, longest + 1, (len(widths), 1))
        noise = generator.uniform(-0.49, 0.49, widths.shape)  # below half a channel: it does not change the rounding
        return self.complete(np.clip(widths + steps, self.low, self.sizes) + noise)

    def rounded(self, ratios: np.ndarray) -> np.ndarray:
        """Widths [n, groups] of ratios [n, groups] as they are, without projection."""
        return np.maximum(1, np.rint(ratios * self.sizes))

    def overshoot(self, ratios: np.ndarray) -> np.ndarray:
        """How far ratios [n, groups] are above the budget before projection, as a fraction of it, at least 0 [n]."""
        return np.maximum(0, self.expense.of(self.rounded(ratios)) / self.target - 1)

    def meets(self, widths: np.ndarray) -> np.ndarray:
        """Whether widths [n, groups] lie in the space [n]."""
        return self.spends(widths) & ((widths >= self.low) & (widths <= self.sizes)).all(1)

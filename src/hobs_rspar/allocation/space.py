"""The allocations that a search may choose from: widths between the floors and the full sizes that meet a budget."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np

from hobs_rspar.allocation.expense import Expense, Macs
from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError

SMALL = 300_000  # allocations of a network small enough to look at all of them
BLOCK = 1024  # allocations completed at once: bounds the memory for networks with many groups
LEAST = 1e-9  # of the budget: what a step must come nearer, or rounding errors of a latency would go in circles
DECIMALS = 9  # distances that differ by less are equal, and the gap to the budget decides


@dataclass(frozen=True)
class Space:
    """A budget and its floors.

    Attributes:
        groups: of the dense network.
        budget: kept fraction of what the dense network spends.
        min_ratio: floor of every group.
        tolerance: |kept - budget| / budget that counts as met.
        expense: what is spent; None: MACs.
        round_to: widths of plans are multiples of this (see ``rounding.py``); a search chooses among all widths.
    """

    groups: Groups
    budget: float
    min_ratio: float = 0.0
    tolerance: float = 0.01
    expense: Expense | None = None
    round_to: int = 1

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
        """Widths in proportion to ratios that meet the budget.

        Args:
            ratios: wanted kept ratios [n, groups], any positive scale.

        Returns:
            Kept channels [n, groups].

        Raises:
            UserError: the floors alone cost more than the budget, or no widths come within the tolerance.
        """
        spent, sizes, low = self.expense.of, self.sizes, self.low
        if spent(low) > self.ceiling:
            whole = "; ".join(f"{group.name}: {group.protected}" for group in self.groups if group.protected) or "none"
            raise UserError(f"budget {self.budget:g}x {self.expense.unit} cannot be met: with every group at its floor "
                            f"(allocation.min_ratio {self.min_ratio:g}) {self.spent(low):.4f}x remain; raise the "
                            f"budget or lower allocation.min_ratio. Groups that are kept whole: {whole}")
        below, above = np.zeros((len(ratios), 1)), 1.0 / np.maximum(ratios.min(1, keepdims=True), 1e-9)
        for _ in range(60):  # bisection on the common scale, on real-valued widths
            middle = (below + above) / 2
            over = spent(np.clip(middle * ratios * sizes, low, sizes))[:, None] > self.target
            below, above = np.where(over, below, middle), np.where(over, middle, above)
        return self.complete(np.clip(below * ratios * sizes, low, sizes))

    def complete(self, wanted: np.ndarray) -> np.ndarray:
        """Rounds real-valued widths and adds or takes back single channels until the budget is met.

        Every step takes the change (one channel, or one channel moved between two groups) that comes nearest to
        ``wanted`` among those that reduce the distance to the budget, preferring those that meet it.

        Args:
            wanted: [n, groups].

        Returns:
            Kept channels [n, groups].
        """
        widths = np.clip(np.rint(wanted), self.low, self.sizes).astype(int)
        unmet = np.arange(len(widths))
        while len(unmet := unmet[~self.spends(widths[unmet])]):
            for rows in np.array_split(unmet, -(-len(unmet) // BLOCK)):
                widths[rows] = self._step(widths[rows], wanted[rows])
        return widths

    def disturbed(self, widths: np.ndarray, longest: int, generator: np.random.Generator) -> np.ndarray:
        """Widths [n, groups] after one random change each of up to ``longest`` channels, completed.

        A change adds, removes or exchanges channels; noise decides which other groups make up for the budget. Where
        single channels do not lead back to the budget, as in a network with few of them, a row stays as it was.
        """
        changes = moves(len(self.sizes))[0]
        steps = changes[generator.integers(len(changes), size=len(widths))]
        steps = steps * generator.integers(1, longest + 1, (len(widths), 1))
        noise = generator.uniform(-0.49, 0.49, widths.shape)  # below half a channel: it does not change the rounding
        return self._completed(np.clip(widths + steps, self.low, self.sizes) + noise, widths)

    def rounded(self, ratios: np.ndarray) -> np.ndarray:
        """Widths [n, groups] of ratios [n, groups] as they are, without projection."""
        return np.maximum(1, np.rint(ratios * self.sizes))

    def overshoot(self, ratios: np.ndarray) -> np.ndarray:
        """How far ratios [n, groups] are above the budget before projection, as a fraction of it, at least 0 [n]."""
        return np.maximum(0, self.expense.of(self.rounded(ratios)) / self.target - 1)

    def meets(self, widths: np.ndarray) -> np.ndarray:
        """Whether widths [n, groups] lie in the space [n]."""
        return self.spends(widths) & ((widths >= self.low) & (widths <= self.sizes)).all(1)

    def _completed(self, wanted: np.ndarray, before: np.ndarray) -> np.ndarray:
        """As ``complete``, but a row that cannot meet the budget is that of ``before`` [n, groups]."""
        try:
            return self.complete(wanted)
        except UserError:
            if len(wanted) == 1:
                return before
            return np.concatenate([self._completed(*pair) for pair in zip(wanted[:, None], before[:, None])])

    def _step(self, widths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The best change of each of some widths [n, groups]; all other widths where no single change helps."""
        sizes, (changes, up, down) = self.sizes, moves(len(self.sizes))
        gaps = np.abs(self.expense.after(widths, changes) - self.target)
        nearer = gaps < np.abs(self.expense.of(widths) - self.target)[:, None] - LEAST * self.target
        nearer &= (widths == sizes) @ up + (widths == self.low) @ down == 0
        before = np.abs(widths - wanted)
        distance = ((np.abs(widths + 1 - wanted) - before) / sizes) @ up
        distance += ((np.abs(widths - 1 - wanted) - before) / sizes) @ down
        unmet = gaps > self.tolerance * self.target
        best = _first(np.where(nearer, distance + 1e3 * unmet, np.inf), gaps)
        changed = widths + changes[best]
        for row in np.flatnonzero(~nearer.any(1)):
            changed[row] = self._jump(widths[row], wanted[row])
        return changed

    def _jump(self, widths: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """The widths of a small network nearest to ``wanted`` among all that are nearer to the budget."""
        if np.prod(self.sizes - self.low + 1.0) <= SMALL:
            options = _every(self.low, self.sizes)
            gaps = np.abs(self.expense.of(options) - self.target)
            nearer = gaps < np.abs(self.expense.of(widths) - self.target) - LEAST * self.target
            if nearer.any():
                distance = np.abs((options[nearer] - wanted) / self.sizes).sum(1)
                return options[nearer][_first(distance + 1e3 * (gaps[nearer] > self.tolerance * self.target),
                                              gaps[nearer])]
        raise UserError(f"budget {self.budget:g}x {self.expense.unit} cannot be met within {self.tolerance:.1%}: the "
                        f"nearest widths keep {self.spent(widths):.4f}x (group "
                        f"{self.groups[int(np.argmax(widths - wanted))].name} is the coarsest); change the budget")


class HeldSpace(Space):
    """The same space without the upper tolerance, which a search would use up and win by.

    What remains is the budget, or what uniform widths spend where rounding leaves those above it.
    """

    @cached_property
    def most(self) -> float:
        """The most that may be spent."""
        return max(self.target, float(self.expense.of(self.uniform)))

    def meets(self, widths: np.ndarray) -> np.ndarray:
        return super().meets(widths) & (self.expense.of(widths) <= self.most)


def floors(groups: Groups, min_ratio: float) -> np.ndarray:
    """Fewest channels each group may keep [groups]: a fraction, at least one; all of a protected group."""
    least = np.maximum(1, np.ceil(min_ratio * groups.sizes - 1e-9).astype(int))
    return np.where([bool(group.protected) for group in groups], groups.sizes, least)


def _first(distance: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Index of the smallest distance in every row [n]; of equal ones (up to rounding) the one with the least gap."""
    distance = distance.round(DECIMALS)
    return np.where(distance == distance.min(-1, keepdims=True), gaps, np.inf).argmin(-1)


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

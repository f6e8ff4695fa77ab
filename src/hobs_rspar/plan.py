"""A pruning plan: for every group, the channels that are kept, who decided, and why. Stored as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hobs_rspar.errors import UserError


@dataclass(frozen=True)
class GroupPlan:
    """One group's part of a plan: its name, its channels, the kept ones (sorted), and the reason."""

    name: str
    channels: int
    kept: list[int]
    reason: str


@dataclass(frozen=True)
class PruningPlan:
    """The result of a method.

    Attributes:
        network: name of the dense network.
        dataset: name of the data set.
        method: who decided.
        seed: the cell's seed.
        budget: what had to be met, as in ``study.budget``.
        macs: MACs of the pruned network; ``dense_macs`` before.
        decided_by: criterion, allocator and repair in words.
        repair: what the prune stage does after surgery: ``none``, ``batchnorm`` or ``least_squares``.
        groups: one :class:`GroupPlan` per group.
        search: history of a search, or None.
        extra_training_images: images that the method trained on before recovery.
        weights: state dict of the dense network as the method trained it, or None; a file of its own, not JSON.
    """

    network: str
    dataset: str
    method: str
    seed: int
    budget: dict[str, float]
    macs: int
    dense_macs: int
    decided_by: str
    repair: str
    groups: list[GroupPlan]
    search: dict | None = None
    extra_training_images: int = 0
    weights: dict | None = field(default=None, compare=False, repr=False)
    macs_ratio: float = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "macs_ratio", self.macs / self.dense_macs)

    @property
    def kept(self) -> list[list[int]]:
        """Kept channels of every group, in the groups' order."""
        return [group.kept for group in self.groups]

    def save(self, path: Path | str) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = asdict(replace(self, weights=None))
        del text["weights"]
        path.write_text(json.dumps(text, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> PruningPlan:
        """Reads a plan.

        Raises:
            UserError: the file is missing or no plan.
        """
        path = Path(path)
        try:
            text = json.loads(path.read_text())
            text["groups"] = [GroupPlan(**group) for group in text["groups"]]
            text.pop("macs_ratio")
            return cls(**text)
        except FileNotFoundError:
            raise UserError(f"{path} not found; 'dvc repro allocate' makes it") from None
        except (json.JSONDecodeError, KeyError, TypeError) as problem:
            raise UserError(f"{path} is not a pruning plan ({problem}); run 'dvc repro allocate' again") from None

    def check(self, groups) -> None:
        """Makes sure that the plan belongs to a network with these groups.

        Raises:
            UserError: names or sizes of groups differ, or a kept channel does not exist.
        """
        mine = {group.name: group.channels for group in self.groups}
        theirs = {group.name: group.channels for group in groups}
        if mine != theirs:
            odd = sorted(set(mine.items()) ^ set(theirs.items()))[:3]
            raise UserError(f"the plan is for another network: it was made for '{self.network}' with {len(mine)} "
                            f"groups, this network has {len(theirs)}; first differences: {odd}. Allocate again")
        for group in self.groups:
            kept = group.kept
            if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= group.channels:
                raise UserError(f"plan, group {group.name}: kept channels must be sorted, distinct and within 0 to "
                                f"{group.channels - 1}, at least one; seen: {kept[:8]}")

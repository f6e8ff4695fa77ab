"""What a method gets (Context) and gives (a PruningPlan). A method is one file with ``plan`` and ``Options``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar import data
from hobs_rspar.allocation.rounding import in_multiples
from hobs_rspar.allocation.space import Space
from hobs_rspar.checkpoint import load_tensors
from hobs_rspar.coupling import Groups
from hobs_rspar.networks import NetworkSpec
from hobs_rspar.plan import GroupPlan, PruningPlan
from hobs_rspar.seeds import derived_seed, generator


class Method(Protocol):
    """A module of this package: ``plan(context, options)`` chooses the channels to keep, without side effects."""

    def plan(self, context: Context, options) -> PruningPlan: ...


class Inputs(Protocol):
    """Where a method's tensors and images come from: files of the pipeline, or memory (public API)."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """``factors`` or ``gates``, as the sensitivity stage writes them."""

    def images(self, split: str) -> data.Images:
        """``train``, ``calibration`` or ``validation``; never ``test``."""


@dataclass(frozen=True)
class FileInputs:
    """Inputs that the stages wrote, read when they are asked for.

    Attributes:
        dense: folder of the dense network.
        data: folder of the splits.
        device: of the images.
    """

    dense: Path
    data: Path
    device: torch.device

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.dense / f"{name}.safetensors")[0]

    def images(self, split: str) -> data.Images:
        return data.load(self.data, split, self.device)


@dataclass
class Context:
    """Everything that a method may look at. There is no test data in it.

    Attributes:
        network: the dense network, in evaluation mode; must stay as it is.
        spec: what the network is.
        space: budget and floors, and its coupled channels.
        method: the method's name.
        seed: the cell's seed.
        dataset: its name.
        limit: what has to be met, as in ``study.budget``.
        inputs: tensors and images, read when they are asked for.
    """

    network: nn.Module
    spec: NetworkSpec
    space: Space
    method: str
    seed: int
    dataset: str
    limit: dict[str, float]
    inputs: Inputs

    @property
    def groups(self) -> Groups:
        return self.space.groups

    @property
    def cell(self) -> str:
        return f"{self.method}-{self.seed}"

    @cached_property
    def generator(self) -> torch.Generator:
        """Seeded by (seed, stage, method)."""
        return generator(self.seed, "allocate", self.method)

    @property
    def derived_seed(self) -> int:
        """For what wants a number instead of a generator."""
        return derived_seed(self.seed, "allocate", self.method)

    @cached_property
    def calibration(self) -> data.Images:
        return self.inputs.images("calibration")

    @cached_property
    def train(self) -> data.Images:
        return self.inputs.images("train")

    @cached_property
    def validation(self) -> data.Images:
        return self.inputs.images("validation")

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """Kronecker factors of all layers: ``<layer>/a``, ``<layer>/g``."""
        return self.inputs.tensors("factors")

    @cached_property
    def sensitivity(self) -> dict[str, Tensor]:
        """Gate statistics of all groups: ``true_rows`` and ``sampled_rows`` [N, channels]; scores [channels]."""
        return self.inputs.tensors("gates")

    def per_group(self, values: Tensor) -> list[Tensor]:
        """Splits values [..., channels of all groups] into one tensor per group."""
        return list(values.split(self.groups.sizes.tolist(), -1))

    def keep_best(self, scores: Sequence[Tensor], widths: np.ndarray, decided_by: str, *, repair: str = "none",
                  search: dict | None = None, trained: nn.Module | None = None, images: int = 0) -> PruningPlan:
        """The plan that keeps the channels with the highest scores.

        Args:
            scores: per group [channels]; ties go to the lower index.
            widths: kept channels [groups]; made multiples of ``allocation.round_to``.
            decided_by: criterion and allocator in words.
            repair: ``none``, ``batchnorm`` or ``least_squares``, carried out by the prune stage.
            search: history of a search.
            trained: the dense network with the weights that the method trained, which surgery then cuts.
            images: that the method trained on.
        """
        widths, parts = in_multiples(self.space, np.asarray(widths)), []
        if self.space.round_to > 1:
            decided_by = f"{decided_by}, multiples of {self.space.round_to}"
        for group, score, width in zip(self.groups, scores, widths):
            kept = sorted(torch.argsort(-score, stable=True)[:int(width)].tolist())
            reason = f"kept whole: {group.protected}" if group.protected else \
                f"{int(width)} of {group.channels} ({width / group.channels:.0%}): {decided_by}"
            parts.append(GroupPlan(group.name, group.channels, kept, reason))
        weights = None
        if trained is not None:
            weights = {name: part.detach().cpu().contiguous() for name, part in trained.state_dict().items()}
        return PruningPlan(self.spec.name, self.dataset, self.method, self.seed, self.limit,
                           int(self.groups.macs(widths)), self.groups.dense_macs, decided_by, repair, parts,
                           search, images, weights)

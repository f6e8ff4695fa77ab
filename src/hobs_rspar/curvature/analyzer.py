"""The published front of H-OBS: scores of all filters of a user's network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from hobs_rspar import admission, cost
from hobs_rspar.allocation.space import Space
from hobs_rspar.batches import check_range
from hobs_rspar.classifier import check_classifier
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import statistics
from hobs_rspar.curvature.gates import Gates, fisher_score, gate_gradients
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.loaders import from_loader
from hobs_rspar.memory import batch_size
from hobs_rspar.surgery import groups


@dataclass(frozen=True)
class _Options:
    batch_size: int
    positions: int | None
    damping: float


class HOBSSensitivityAnalyzer:
    """Second-order sensitivity of all filters of a network, as the published API has it.

    Args:
        model: in any mode; untouched.
        damping: of the covariances, relative to their mean diagonal.
        use_kfac: True: Kronecker-factored OBS on the consumers' inputs (H-OBS). False: the exact Fisher of the gates,
            half of E[s^2], without any Kronecker assumption.
    """

    def __init__(self, model: nn.Module, damping: float = 1e-3, use_kfac: bool = True):
        if not isinstance(damping, Real) or not 0 < damping < math.inf:
            raise UserError(f"damping must be a number above 0, relative to the mean diagonal; seen: {damping!r}")
        self.model, self.damping, self.use_kfac = model, damping, use_kfac
        self._groups: Groups | None = None
        self._scores: list[Tensor] = []

    def compute_sensitivity(self, dataloader, criterion=None, num_batches: int = 10) -> dict[str, Tensor]:
        """Scores of all filters of all layers whose channels can be removed.

        Args:
            dataloader: yields (images [n, C, H, W], labels [n]).
            criterion: only cross entropy, the default, defines the Fisher used here; anything else is refused.
            num_batches: batches to use: as many images, drawn at random, of a DataLoader over a map-style data set;
                the first ones of a stream.

        Returns:
            Layer name -> scores [filters], in units of the loss. Coupled layers share their group's scores.

        Raises:
            UserError: another criterion, no network that can be pruned, or a dataloader that yields something else.
        """
        if criterion is not None and not isinstance(criterion, nn.CrossEntropyLoss):
            raise UserError(f"criterion {type(criterion).__name__} is not supported: the Fisher is that of the "
                            "softmax cross entropy; leave criterion out")
        if not isinstance(num_batches, Integral) or num_batches < 1:
            raise UserError(f"num_batches is the number of batches to use, 1 or more; seen: {num_batches!r}")
        admission.check_network(self.model)
        images, batch = from_loader(dataloader, num_batches)
        images = images.to(next(self.model.parameters()).device)
        example = images.normalised(images.pixels[:1])
        check_range(images.labels, check_classifier(self.model, example))
        with cost.evaluation(self.model):
            self._groups = groups(self.model, example)
            statistics.refuse_nothing(self.model, self._groups)
            batch = batch_size(self.model, example, batch)
            self._scores = self._score(images, batch, torch.Generator().manual_seed(0))
        return {member.layer: scores for group, scores in zip(self._groups, self._scores)
                for member in group.with_role("producer", "depthwise")}

    def _score(self, images: Images, batch: int, generator: torch.Generator) -> list[Tensor]:
        def fisher() -> list[Tensor]:
            gates = Gates(self._groups)
            return gates.split(fisher_score(gate_gradients(self.model, gates, images, batch, generator)))

        if not self.use_kfac:
            return fisher()
        options = _Options(batch, None, self.damping)
        layers = statistics.consumer_layers(self._groups)
        factors = statistics.factors(self.model, layers, images, options, generator)
        scores = statistics.eliminations(self.model, self._groups, factors, self.damping, fisher)["hobs"]
        return list(scores.split(self._groups.sizes.tolist()))

    def get_pruning_plan(self, pruning_ratio: float = 0.5) -> dict[str, list[int]]:
        """Filters to remove so that ``pruning_ratio`` of the MACs go, with uniform widths.

        Args:
            pruning_ratio: fraction of the MACs to remove, in (0, 1).

        Returns:
            Layer name (the group's first producer) -> filter indices to prune, for :class:`PhysicalPruner`.

        Raises:
            UserError: ``compute_sensitivity`` was not called, or the ratio is out of range.
        """
        if self._groups is None:
            raise UserError("call compute_sensitivity(dataloader) first")
        if not isinstance(pruning_ratio, Real) or not 0 < pruning_ratio < 1:
            raise UserError(f"pruning_ratio is the fraction of MACs to remove and must be within (0, 1); seen: "
                            f"{pruning_ratio!r}")
        widths = Space(self._groups, 1 - pruning_ratio).uniform
        return {group.name: sorted(scores.argsort(stable=True)[:group.channels - int(width)].tolist())
                for group, scores, width in zip(self._groups, self._scores, widths)}

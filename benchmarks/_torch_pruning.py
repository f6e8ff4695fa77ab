"""Torch-Pruning's own pruner and criteria, used as its examples do, down to a fraction of the MACs."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar import cost
from hobs_rspar.data import Images

STEPS = 40  # of Torch-Pruning's pruner, from all channels to none; scores are computed anew before each
Backward = Callable[[nn.Module, Images], None]


def once(importance) -> Backward:
    """The gradient of the mean loss, which Taylor's criterion reads from the parameters."""
    def backward(network: nn.Module, images: Images) -> None:
        network.zero_grad()
        F.cross_entropy(network(images.normalised(images.pixels)), images.labels).backward()
    return backward


def by_image(importance) -> Backward:
    """Squared gradients, image by image, as the Hessian criterion of Torch-Pruning asks for."""
    def backward(network: nn.Module, images: Images) -> None:
        importance.zero_grad()
        for x, label in images.batches(1):
            network.zero_grad()
            F.cross_entropy(network(x), label).backward()
            importance.accumulate_grad(network)
    return backward


@dataclass(frozen=True)
class Peer:
    """One of its criteria, the gradients that it needs, and whether it compares channels of all layers."""

    criterion: type
    gradients: Callable[..., Backward] | None
    everywhere: bool


PEERS = {
    "GroupMagnitude, uniform": Peer(tp.importance.GroupMagnitudeImportance, None, False),
    "GroupMagnitude, global": Peer(tp.importance.GroupMagnitudeImportance, None, True),
    "GroupTaylor, global": Peer(tp.importance.GroupTaylorImportance, once, True),
    "GroupHessian, global": Peer(tp.importance.GroupHessianImportance, by_image, True),
}


@dataclass(frozen=True)
class Task:
    """What it has to do.

    Attributes:
        network: dense; untouched.
        example: its input [1, C, H, W].
        images: for gradients before each step.
        budget: fraction of the MACs to keep.
    """

    network: nn.Module
    example: Tensor
    images: Images
    budget: float

    def pruned(self, peer: Peer) -> nn.Module:
        """The dense network after as many of the pruner's steps as come nearest to the budget."""
        network, importance = copy.deepcopy(self.network), peer.criterion()
        backward = peer.gradients(importance) if peer.gradients else None
        classifier = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1:]
        pruner = tp.pruner.BasePruner(network, self.example, importance, global_pruning=peer.everywhere,
                                      pruning_ratio=1.0, max_pruning_ratio=0.9, iterative_steps=STEPS,
                                      ignored_layers=classifier)
        wanted = self.budget * self._macs(network)
        for _ in range(STEPS):
            before = copy.deepcopy(network)
            if backward:
                backward(network, self.images)
            pruner.step()
            network.zero_grad()
            if self._macs(network) <= wanted:
                break
        return min(before, network, key=lambda made: abs(self._macs(made) - wanted))

    def _macs(self, network: nn.Module) -> int:
        return cost.count(network, self.example).macs

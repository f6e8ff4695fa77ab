"""What an allocation is worth: the accuracy of the pruned and repaired network on validation images.

Channels have a fixed order (H-OBS's elimination order), so an allocation is one width per group. Surgery is slicing,
repair is the closed-form refit from the input covariances that sensitivity already has, kept per (group, width): one
evaluation is a look-up and a forward pass of a small network, on fewer images where they are large.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar import checkpoint
from hobs_rspar.allocation.refits import Refits
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.observe import frontier
from hobs_rspar.curvature.repair import BATCH, batch_size, reestimate_batchnorm
from hobs_rspar.data import Images
from hobs_rspar.memory import return_freed_memory
from hobs_rspar.training import accuracy, logits

PIXELS = 2**20  # of the images on which an allocation is evaluated: 1,024 of 32x32
FEWEST = 256  # of them in any case: with half as many the search chooses by noise (benchmarks/_oneshot.py)


def affordable(images: Images, most: int, share: float = 1.0) -> Images:
    """The first ``most`` of the images, or where they are large as many as ``share`` of an evaluation's is."""
    height, width = images.pixels.shape[-2:]
    return images.first(min(most, int(share * max(FEWEST, PIXELS // (height * width)))))


@dataclass(frozen=True)
class Evaluation:
    """Accuracy (fraction) and cross entropy on the validation images."""

    accuracy: float
    loss: float


class PruningEnvironment:
    """Evaluates allocations of one network.

    Args:
        network: dense; untouched.
        groups: of the network.
        order: per group the channels, the first to go first.
        factors: ``<layer>/a`` of all consumers.
        calibration: images for the batch norms' statistics.
        validation: images of the reward; never test images.
        refit: whether consumers are refitted; otherwise only batch norms are re-estimated.

    Attributes:
        dense: the dense network's own evaluation.
        images: images passed through pruned networks so far, the cost of the search.
    """

    RIDGE = 1e-3
    PRECISION = "auto"  # a forward pass in bf16 takes half the time where the hardware has it

    def __init__(self, network: nn.Module, groups: Groups, order: list[Tensor], factors: dict[str, Tensor],
                 calibration: Images, validation: Images, refit: bool = True):
        self.network, self.groups, self.order = network, groups, order
        self.calibration, self.validation = calibration, validation
        self.batch = batch_size(frontier(network, calibration.normalised(calibration.pixels[:1])))
        self.state = network.state_dict()
        self.images = 0
        self.dense = self._evaluate(network)
        self._known: dict[tuple[int, ...], Evaluation] = {}
        self._refits = Refits(network, groups, order, factors, self.RIDGE) if refit else None

    @property
    def evaluations(self) -> int:
        """Different allocations evaluated so far."""
        return len(self._known)

    def kept(self, widths: np.ndarray) -> list[list[int]]:
        """Kept channels of every group, sorted."""
        return [sorted(order[len(order) - int(width):].tolist()) for order, width in zip(self.order, widths)]

    def evaluate(self, widths: np.ndarray) -> Evaluation:
        """Prunes, repairs and measures; an allocation seen before costs nothing."""
        key = tuple(int(width) for width in widths)
        if key not in self._known:
            self.images += len(self.calibration)
            self._known[key] = self._evaluate(self.repaired(widths))
        return self._known[key]

    def loss_on(self, widths: np.ndarray, images: Images) -> float:
        """Cross entropy of an allocation on other validation images than the reward's."""
        self.images += len(self.calibration) + len(images)
        network = self.repaired(widths)
        return F.cross_entropy(logits(network, images, self.PRECISION, self._batch(images)), images.labels.cpu()).item()

    def repaired(self, widths: np.ndarray) -> nn.Module:
        """The pruned network, its consumers refitted and its batch norms re-estimated."""
        if self.batch < BATCH:  # large images: every allocation has activations of other sizes
            return_freed_memory()
        network = self.pruned(widths)
        reestimate_batchnorm(network, self.calibration, self.PRECISION, self._batch(self.calibration))
        return network

    def pruned(self, widths: np.ndarray) -> nn.Module:
        """The pruned network with refitted consumers, its batch norms not yet re-estimated."""
        state = dict(self.state)
        for g, width in enumerate(widths) if self._refits else ():
            for name, change in self._refits.change(g, int(width)).items():
                state[name] = state[name] + change
        state = self.groups.sliced(state, self.kept(widths))
        return checkpoint.fit(copy.deepcopy(self.network), state, "allocation").to(
            memory_format=self.validation.layout)

    def _batch(self, images: Images) -> int:
        """Images a pass, in passes of one size: every new shape costs the convolution library a compilation."""
        passes = -(-len(images) // self.batch)
        return self.batch if self.batch == BATCH else -(-len(images) // passes)

    def _evaluate(self, network: nn.Module) -> Evaluation:
        out = logits(network, self.validation, self.PRECISION, self._batch(self.validation))
        labels = self.validation.labels.cpu()
        self.images += len(self.validation)
        return Evaluation(accuracy(out, labels) / 100, F.cross_entropy(out, labels).item())

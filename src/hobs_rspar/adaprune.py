"""AdaPrune (surrogate): equally many zeros in every group of weights that an accelerator fetches together.

Paper: Li & Louri, AdaPrune: An Accelerator-Aware Pruning Technique for Sustainable CNN Accelerators, IEEE Transactions
on Sustainable Computing 2021. Its full text was not at hand, only its abstract, hence *surrogate*. As the abstract
says: zeros are spread evenly over the groups, and groups lie along a layer's input or its output channels, whichever
the accelerator fetches together. Our own: weights of the smallest magnitude go, and equally many of every group stay,
in all layers, but for one more in those groups where it retains most for its MACs. Published: 1.6 times the speed and
1.5 times less energy, of a simulated accelerator.

This is masked sparsity: all tensors keep their shapes, and a dense kernel multiplies by the zeros. So it is no method
of a study and not in its tables; ``benchmarks/masked.py`` gives it a table of its own.
"""

from __future__ import annotations

import copy
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from hobs_rspar import admission, cost
from hobs_rspar.errors import UserError
from hobs_rspar.loaders import from_loader

AXES = {"input": 1, "output": 0}  # of a weight [outputs, inputs, ...], along which a fetch reads
TOLERANCE = 0.01
Masks = dict[str, Tensor]  # layer -> which of its weights stay, booleans in the weight's shape


def adaprune_prune(model: nn.Module, dataloader, pruning_ratio: float = 0.5, *, direction: str = "input",
                   group: int = 16) -> nn.Module:
    """AdaPrune (surrogate): a copy of the model with equally many zeros in every group of weights.

    Train it on with :func:`hold` after every step, or the zeros fill up again.

    Args:
        model: PyTorch model to prune; untouched.
        dataloader: yields (images, labels); only the images' size is used, of one batch.
        pruning_ratio: fraction of MACs to remove, in [0, 1): those of weights that become zero.
        direction: ``input`` or ``output``, the channels that a fetch reads.
        group: weights that are fetched together.

    Returns:
        The model with zeros; its layers have the shapes that they had, so a dense kernel is not faster.

    Raises:
        UserError: an argument is out of range, one weight in every group is more than may be kept, or the model cannot
            be copied, run or masked.
    """
    _check(1 - pruning_ratio if isinstance(pruning_ratio, Real) else pruning_ratio, direction, group)
    admission.check_network(model)
    images, _ = from_loader(dataloader, batches=1)
    pruned = copy.deepcopy(model)
    example = images.normalised(images.pixels[:1]).to(next(pruned.parameters()).device)
    admission.check_example(pruned, example)
    hold(pruned, masks(pruned, example, 1 - pruning_ratio, direction, group))
    return pruned


def masks(network: nn.Module, example: Tensor, kept: float, direction: str = "input", group: int = 16) -> Masks:
    """Which weights of every convolution and linear layer stay.

    Args:
        network: trained; untouched.
        example: input [1, C, H, W] on the network's device.
        kept: fraction of these layers' MACs.
        direction: see :func:`adaprune_prune`.
        group: likewise.

    Raises:
        UserError: as :func:`adaprune_prune`.
    """
    _check(kept, direction, group)
    macs = _weight_macs(network, example)
    layers = [_Layer(layer.weight.detach().cpu(), _axis(layer, direction), group, count)
              for layer, count in ((network.get_submodule(name), count) for name, count in macs.items())]
    budget = kept * sum(macs.values())
    base = max((stay for stay in range(1, group + 1) if _macs(layers, stay) <= budget), default=1)
    left = budget - _macs(layers, base)
    if -left > TOLERANCE * budget:
        raise UserError(f"with one weight in every group of {group} along the {direction} channels "
                        f"{_macs(layers, 1) / sum(macs.values()):.4f} of the MACs are left, more than {kept:g}; raise "
                        "the fraction, or the size of a group")
    more = _most_valuable([layer.next_gains(base) for layer in layers], [layer.weight_macs for layer in layers], left)
    return {name: layer.mask(base, extra).to(example.device) for name, layer, extra in zip(macs, layers, more)}


@torch.no_grad()
def hold(network: nn.Module, masks: Masks) -> None:
    """Sets all other weights to zero again: after every step of training, for the optimiser moves them."""
    for name, mask in masks.items():
        network.get_submodule(name).weight.mul_(mask)


def kept_macs(network: nn.Module, example: Tensor, masks: Masks) -> float:
    """Fraction of the layers' MACs whose weights stay."""
    macs = _weight_macs(network, example)
    return sum(count * masks[name].double().mean().item() for name, count in macs.items()) / sum(macs.values())


def _check(kept: float, direction: str, group: int) -> None:
    if direction not in AXES:
        raise UserError(f"direction is '{direction}'; allowed: {', '.join(AXES)}")
    if not isinstance(group, Integral) or group < 2 or not isinstance(kept, Real) or not 0 < kept <= 1:
        raise UserError(f"group must be 2 or more and the kept fraction of MACs within (0, 1]; seen: {group}, {kept}")


def _weight_macs(network: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of every layer; products of activations have no weights that could be zero."""
    return {name: macs for name, macs in cost.layer_macs(network, example).items() if name != cost.OTHERS}


def _axis(layer: nn.Module, direction: str) -> int:
    """The axis of a layer's weight; transposed convolutions have their inputs first."""
    return 1 - AXES[direction] if isinstance(layer, cost.TRANSPOSED) else AXES[direction]


class _Layer:
    """One layer's weights by the groups in which they are fetched; the last ones may be smaller.

    Args:
        weight: [outputs, inputs, ...].
        axis: along which groups lie.
        group: weights of a group.
        macs: of the layer, with all weights.

    Attributes:
        energy: squared weights, their share of the layer's, in descending order in every group; -1 where a smaller
            group has no weight [groups along the axis, group, others].
        weight_macs: of one weight.
    """

    def __init__(self, weight: Tensor, axis: int, group: int, macs: int):
        self.shape, self.axis, self.group = weight.movedim(axis, 0).shape, axis, group
        squares = weight.movedim(axis, 0).flatten(1).square()
        blank = -squares.new_ones(-len(squares) % group, squares.shape[1])
        parts = torch.cat([squares / squares.sum().clamp_min(1e-30), blank]).unflatten(0, (-1, group))
        self.energy, self.order = parts.sort(dim=1, descending=True, stable=True)
        self.sizes = (parts[:, :, :1] >= 0).sum(1, keepdim=True)
        self.weight_macs = macs / weight.numel()

    def counts(self, stay: int) -> Tensor:
        """Weights that stay in each group, if ``stay`` do in a whole one [groups along the axis, 1, 1].

        There is nothing to choose in groups of one weight, such as a depthwise convolution's along its inputs.
        """
        return (self.sizes * stay / self.group).round().long().clamp_min(1)

    def macs(self, stay: int) -> float:
        return self.weight_macs * self.counts(stay).sum().item() * self.energy.shape[2]

    def next_gains(self, stay: int) -> Tensor:
        """Energy per MAC of the largest weight that goes in every group; -1 where none does [groups, others]."""
        ends = torch.cat([self.energy, -torch.ones_like(self.energy[:, :1])], 1)
        found = ends.gather(1, self.counts(stay).expand(-1, -1, ends.shape[2])).squeeze(1)
        return torch.where(found < 0, found, found / self.weight_macs)

    def mask(self, stay: int, more: Tensor) -> Tensor:
        """The weights that stay; one more in the groups in ``more`` [groups, others]."""
        places = torch.arange(self.group).view(1, -1, 1).expand_as(self.order)
        ranks = torch.empty_like(self.order).scatter_(1, self.order, places)
        kept = ranks < self.counts(stay) + more[:, None].long()
        return kept.flatten(0, 1)[:self.shape[0]].reshape(self.shape).movedim(0, self.axis)


def _macs(layers: list[_Layer], stay: int) -> float:
    return sum(layer.macs(stay) for layer in layers)


def _most_valuable(gains: list[Tensor], costs: list[float], left: float) -> list[Tensor]:
    """Which groups of each layer get one more weight: the highest gains, as far as the MACs that are left go."""
    flat = torch.cat([gain.flatten() for gain in gains])
    price = torch.cat([torch.full((gain.numel(),), cost, dtype=torch.double) for gain, cost in zip(gains, costs)])
    order = flat.argsort(descending=True, stable=True)
    taken = torch.zeros(len(flat), dtype=torch.bool)
    taken[order] = (price[order].cumsum(0) <= left) & (flat[order] >= 0)
    return [part.reshape(gain.shape) for part, gain in zip(taken.split([gain.numel() for gain in gains]), gains)]

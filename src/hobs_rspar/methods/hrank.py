"""HRank: channels whose feature maps have the lowest rank go first, at uniform widths.

Paper: Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020. Faithful: a channel's score is the mean
rank of its feature map over 500 images, after the activation. Changed: their rates per layer, set by hand for every
network, are replaced by uniform widths that meet the budget, since ranks of maps of different size cannot be compared;
a residual stream has the mean over the layers that read it; one recovery at the end instead of 30 epochs after every
layer. Published: ResNet-56 on CIFAR-10 93.26 to
93.17 % at 50 % fewer MACs, ResNet-50 on ImageNet 74.98 % at 2.30 G MACs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hobs_rspar.config import Positive, Section
from hobs_rspar.coupling import Groups, Member
from hobs_rspar.curvature.layout import Pass, by_image, channel_axis
from hobs_rspar.data import Images
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

BATCH = 50  # images a pass: bounds the memory of the decompositions


class Options(Section):
    """Options of the criterion; params.yaml says what each is for."""

    images: Positive = 500


def plan(context: Context, options: Options) -> PruningPlan:
    scores = mean_ranks(context.network, context.groups, context.calibration.first(options.images))
    return context.keep_best(scores, context.space.uniform, "mean rank of feature maps, uniform widths")


@torch.no_grad()
def mean_ranks(network: nn.Module, groups: Groups, images: Images) -> list[Tensor]:
    """Mean rank of every channel's map, over images and over the layers that read it: per group [channels]."""
    found = [[torch.zeros(group.channels) for _ in group.with_role("consumer")] for group in groups]
    count = Pass()
    hooks = [count.watch(network)]
    hooks += [network.get_submodule(member.layer).register_forward_pre_hook(adder(member, total, count))
              for group, totals in zip(groups, found) for member, total in zip(group.with_role("consumer"), totals)]
    try:
        for x, _ in images.batches(BATCH):
            network(x)
    finally:
        for handle in hooks:
            handle.remove()
    return [sum(totals, torch.zeros(group.channels)) / max(1, len(totals)) / len(images)
            for group, totals in zip(groups, found)]


def adder(member: Member, total: Tensor, count: Pass):
    """A hook that adds to ``total`` [channels] the ranks of the maps that the member reads."""
    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = by_image(layer, inputs[0].float(), count.images)
        total.add_(torch.linalg.matrix_rank(maps(x.movedim(channel_axis(layer), 1), member)).sum(0).cpu())
    return add


def maps(x: Tensor, member: Member) -> Tensor:
    """A layer's input [n, inputs, ...] as one matrix per image and channel of the group [n, channels, rows, columns].

    A map that was flattened (for a linear layer, or to tokens) becomes a square again, or a row where it was none.
    """
    parts = x[:, torch.tensor(member.index)]  # [n, channels, places of each, *positions]
    if x.dim() > 3:
        return parts.flatten(2, -2)
    parts = parts.flatten(2)
    side = math.isqrt(parts.shape[2])
    return parts.unflatten(2, (side, side) if side**2 == parts.shape[2] else (1, -1))

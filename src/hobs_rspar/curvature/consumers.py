"""The consumers of a group as H-OBS sees them, from a network's weights and its Kronecker factors.

A grouped convolution is one consumer for each of its groups, each with all the channels. A very wide layer, whose A is
kept in blocks of the diagonal, is one for each block, with the channels of that block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Group, Member
from hobs_rspar.curvature.elimination import Consumer
from hobs_rspar.curvature.factors import fisher_diagonal


def centred(factor: Tensor) -> Tensor:
    """Covariance (times the number of positions) of patches from a factor with the constant's row: [d, d]."""
    mean = factor[:-1, -1]
    return factor[:-1, :-1] - torch.outer(mean, mean) / factor[-1, -1]


def consumers(group: Group, network: nn.Module, factors: Mapping[str, Tensor]) -> list[Consumer]:
    """The group's consumers in double precision; those without factors (see ``Groups.opaque``) are left out.

    Args:
        group: of the network.
        network: whose weights are read.
        factors: ``<layer>/a`` and ``<layer>/g`` or ``<layer>/fisher``; ``<layer>/columns`` of very wide layers.
    """
    return [part for member in group.with_role("consumer") if f"{member.layer}/a" in factors
            for part in _parts(member, network.get_submodule(member.layer), factors)]


def _parts(member: Member, layer: nn.Module, factors: Mapping[str, Tensor]) -> Iterator[Consumer]:
    name, number = member.layer, getattr(layer, "groups", 1)
    columns, index = factors.get(f"{name}/columns"), torch.tensor(member.index)
    weight = layer.weight.detach().double().cpu()
    weight = weight.reshape(number, -1, weight.shape[1], weight[0, 0].numel())
    fisher = fisher_diagonal(factors, name).double().reshape(number, -1)
    a = factors[f"{name}/a"].unflatten(0, (number, -1))
    for i in range(number):
        own = index[index // weight.shape[2] == i].view(len(index), -1) - i * weight.shape[2]
        whole = Consumer(weight[i], a.new_zeros(0), fisher[i], own, source=(name, i))
        yield from _blocks(whole, a[i], columns)


def _blocks(whole: Consumer, a: Tensor, columns: Tensor | None) -> Iterator[Consumer]:
    """One consumer for each block of A [blocks, b + 1, b + 1]; ``whole`` has all but the covariance."""
    if columns is None:
        yield Consumer(whole.weight, centred(a[0].double()), whole.fisher, whole.index, source=whole.source)
        return
    flat, every = whole.weight.flatten(1), whole.columns
    for block, part in zip(a, columns):
        part = part[part >= 0]
        place = torch.full((flat.shape[1],), -1).index_put_((part,), torch.arange(len(part)))
        channels = (place[every[:, 0]] >= 0).nonzero()[:, 0]
        rows = [*range(len(part)), len(block) - 1]
        if len(channels):
            yield Consumer(flat[:, part, None], centred(block[rows][:, rows].double()), whole.fisher,
                           place[every[channels]], channels, whole.source, part)

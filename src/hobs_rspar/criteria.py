"""Criteria that need weights alone. Scores per group [channels]; higher is more important."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Group, Groups, Member

CONSUMERS = ("consumer", "auxiliary")
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def filter_norms(network: nn.Module, groups: Groups, power: float) -> list[Tensor]:
    """Norm of the filters that produce each channel, summed over the group's producers (Li et al. 2017 for L1).

    Args:
        network: dense.
        groups: of the network.
        power: 1 for L1, 2 for L2.
    """
    return [_norm(network, group, ("producer", "depthwise"), power) for group in groups]


def group_norms(network: nn.Module, groups: Groups, power: float = 2) -> list[Tensor]:
    """Norm over all weights that a channel takes with it (DepGraph's group norm): producers, norms, consumers."""
    return [_norm(network, group, ("producer", "depthwise", "norm", *CONSUMERS), power) for group in groups]


def normalised(scores: list[Tensor]) -> list[Tensor]:
    """Scores divided by their group's mean, so that groups of different scale share one threshold."""
    return [score / score.mean().clamp_min(1e-30) for score in scores]


def weights(network: nn.Module, member: Member) -> Iterator[tuple[nn.Parameter, int, list[list[int]]]]:
    """The parameters that a member loses channels of, biases left out, each with the axis and the channels' places.

    Args:
        network: dense.
        member: of one of its groups.

    Yields:
        The parameter, the axis on which channels lie, and every channel's places on it [channels][1 or more]: a
        grouped convolution has the inputs of one of its groups only, so that several of its own inputs are one place.
    """
    layer = network.get_submodule(member.layer)
    for name, axis in member.cuts or (("weight", 1 if member.role in CONSUMERS else 0),):
        parameter = getattr(layer, name, None)
        if isinstance(parameter, nn.Parameter) and name != "bias":
            size = parameter.shape[axis]
            yield parameter, axis, [sorted({i % size for i in own}) for own in member.index]


def places_of(places: list[list[int]], channels: Iterable[int], device: torch.device) -> Tensor:
    """Places of some channels, as :func:`weights` gives them, in one tensor."""
    return torch.tensor([i for channel in channels for i in places[channel]], dtype=torch.long, device=device)


def filters(layer: nn.Module) -> Tensor:
    """A layer's weight, one row for each of its outputs [outputs, inputs per group x kernel area]."""
    weight = layer.weight.detach()
    if isinstance(layer, TRANSPOSED):
        parts = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return parts.reshape(layer.out_channels, -1)
    return weight.flatten(1)


def readers(layer: nn.Module) -> Tensor:
    """A layer's weight, one row for each of its inputs [inputs, outputs per group x kernel area]."""
    weight = layer.weight.detach()
    if isinstance(layer, TRANSPOSED):
        return weight.flatten(1)
    parts = weight.unflatten(0, (getattr(layer, "groups", 1), -1)).transpose(1, 2)
    return parts.flatten(0, 1).flatten(1)


def _norm(network: nn.Module, group: Group, roles: tuple[str, ...], power: float) -> Tensor:
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.with_role(*roles):
        for rows in _rows(network, member):
            powers = (rows.double().cpu().abs() ** power).reshape(len(rows), -1).sum(1)
            total += powers[torch.tensor(member.index)].sum(1)
    return total ** (1 / power)


def _rows(network: nn.Module, member: Member) -> list[Tensor]:
    """What a member has for each of its own indices: one row each."""
    layer = network.get_submodule(member.layer)
    if member.role in CONSUMERS:
        return [readers(layer)]
    if member.role != "norm":
        return [filters(layer)]
    return [parameter.detach().movedim(axis, 0) for parameter, axis, _ in weights(network, member)]

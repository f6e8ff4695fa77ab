"""Criteria that need weights alone. Scores per group [channels]; higher is more important."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Group, Groups


def filter_norms(network: nn.Module, groups: Groups, power: float) -> list[Tensor]:
    """Norm of the filters that produce each channel, summed over the group's producers (Li et al. 2017 for L1).

    Args:
        network: dense.
        groups: of the network.
        power: 1 for L1, 2 for L2.
    """
    return [_norm(network, group, ("producer", "depthwise"), power) for group in groups]


def group_norms(network: nn.Module, groups: Groups, power: float = 2) -> list[Tensor]:
    """Norm over all parameters that a channel takes with it (DepGraph's group norm): producers, norms, consumers."""
    return [_norm(network, group, ("producer", "depthwise", "norm", "consumer"), power) for group in groups]


def normalised(scores: list[Tensor]) -> list[Tensor]:
    """Scores divided by their group's mean, so that groups of different scale share one threshold."""
    return [score / score.mean().clamp_min(1e-30) for score in scores]


def _norm(network: nn.Module, group: Group, roles: tuple[str, ...], power: float) -> Tensor:
    total = torch.zeros(group.channels, dtype=torch.float64)
    for member in group.with_role(*roles):
        weight = network.get_submodule(member.layer).weight.detach().double().cpu().abs() ** power
        weight = weight.transpose(0, 1) if member.role == "consumer" else weight
        total += weight.reshape(len(weight), -1).sum(1)[torch.tensor(member.index)].sum(1)
    return total ** (1 / power)

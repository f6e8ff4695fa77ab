"""UDFC: L1 ranking at uniform widths; what removed filters gave is folded into the next layer, without any data.

Paper: Bai et al., Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning, ICCV 2023. Faithful: one
rate for all layers, and the closed form: a removed filter is a combination of the kept ones, fitted to its weights and,
with weight alpha1, to the constant that its batch norm adds; its place in the next layer's weights is added to theirs
by the same coefficients. Simplified: pruning only, no quantisation, so its tables cannot be compared; compensation only
where it is derived (one convolution with its batch norm before the next layer, not in residual streams nor before
depthwise convolutions). The least-squares repair of ``l1_repair`` needs images, this does not; the accuracy without
recovery compares them. Published (with quantisation): VGG-16 on CIFAR-10 93.70 to 93.40 % with 60 % fewer parameters.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hobs_rspar.config import Section
from hobs_rspar.coupling import Group
from hobs_rspar.criteria import filter_norms
from hobs_rspar.folding import slope
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

DAMPING = 1e-6  # relative to the mean diagonal; there may be more kept filters than weights in one


class Options(Section):
    """Options.

    Attributes:
        alpha: weight of the constants beside the filters' weights, alpha1 of the paper.
    """

    alpha: Annotated[float, Field(ge=0)] = 0.01


def plan(context: Context, options: Options) -> PruningPlan:
    network, norms = copy.deepcopy(context.network), filter_norms(context.network, context.groups, 1)
    widths = context.space.uniform
    for group, norm, width in zip(context.groups, norms, widths):
        order = torch.argsort(-norm, stable=True)
        if len(order) > width and plain(network, group):
            fold(network, group, order[:width].sort().values, order[width:].sort().values, options.alpha)
    return context.keep_best(norms, widths, "L1 norm, uniform widths, compensated without data", trained=network)


def plain(network: nn.Module, group: Group) -> bool:
    """Whether one convolution and its batch norm give the channels, and layers that mix them read them."""
    if [member.role for member in group.members if member.role != "consumer"] != ["producer", "norm"]:
        return False
    producer, norm = (group.with_role(role)[0] for role in ("producer", "norm"))
    consumers = [network.get_submodule(member.layer) for member in group.with_role("consumer")]
    layer, norm = network.get_submodule(producer.layer), network.get_submodule(norm.layer)
    return (type(layer) is nn.Conv2d and len(producer.index[0]) == 1
            and type(norm) is nn.BatchNorm2d and norm.track_running_stats
            and all(type(each) in (nn.Conv2d, nn.Linear) and getattr(each, "groups", 1) == 1 for each in consumers))


@torch.no_grad()
def fold(network: nn.Module, group: Group, kept: Tensor, gone: Tensor, alpha: float) -> None:
    """Adds to the consumers' weights of kept channels what they lose with the others."""
    layers = {member.role: network.get_submodule(member.layer) for member in group.members}
    shares = coefficients(layers["producer"], layers["norm"], kept, gone, alpha)
    for member in group.with_role("consumer"):
        weight = network.get_submodule(member.layer).weight
        inputs = weight.transpose(0, 1).double().flatten(1)
        index = torch.tensor(member.index, device=weight.device)  # [channels, places of each]
        lost = inputs[index[gone]].flatten(1)
        added = inputs.index_add(0, index[kept].flatten(), (shares.T @ lost).view(index[kept].numel(), -1))
        weight.copy_(added.view_as(weight.transpose(0, 1)).transpose(0, 1))


def coefficients(layer: nn.Conv2d, norm: nn.BatchNorm2d, kept: Tensor, gone: Tensor, alpha: float) -> Tensor:
    """Shares of the kept filters in each removed one [gone, kept], the paper's closed form.

    With A = weights after the batch norm and K its constants, it minimises |A_j - sum s_i A_i|^2 +
    alpha (gamma_j / sigma_j)^2 (K_j - sum s_i K_i)^2, which is the paper's without the division by gamma_j.
    """
    scale = slope(norm).double()
    level = norm.running_mean.double() if layer.bias is None else norm.running_mean.double() - layer.bias.double()
    constant = -level * scale if norm.bias is None else norm.bias.double() - level * scale
    filters = layer.weight.double().flatten(1) * scale[:, None]
    products = filters[kept] @ filters[kept].T
    products += DAMPING * products.diagonal().mean() * torch.eye(len(kept), dtype=products.dtype, device=scale.device)
    right = torch.cat([filters[kept] @ filters[gone].T, constant[kept, None]], 1)
    *shares, level = torch.linalg.solve(products, right).T  # of the weights alone; Sherman-Morrison adds the constants
    weight = alpha * scale[gone].square()
    shares = torch.stack(shares) + (weight * constant[gone])[:, None] * level
    excess = weight * (shares @ constant[kept]) / (1 + weight * (level @ constant[kept]))
    return shares - excess[:, None] * level

"""H-OBS: second-order sensitivity of coupled channels.

A channel is removed where it is consumed, so its cost is the Optimal Brain Surgeon's (Hassibi & Stork 1993) on the
consumers' inputs, with the Kronecker-factored Hessian A (x) G of :mod:`hobs_rspar.curvature.kfac`. Removing the inputs
J of a channel from a consumer W, with every other weight compensating optimally, costs

    dL_J = 1/2 tr(G W_J [(A^-1)_JJ]^-1 W_J^T),      W <- W - W_J [(A^-1)_JJ]^-1 (A^-1)_J:

summed over all consumers of the group (residual streams have several). Channels are eliminated greedily; A^-1 is
downdated after each, so one elimination order holds the kept set and the error of every width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Group, Groups
from hobs_rspar.curvature.kfac import KFACHessianApproximator, damped
from hobs_rspar.curvature.passes import sweep
from hobs_rspar.data import Images


@dataclass(frozen=True)
class Consumer:
    """What H-OBS needs of one consumer of a group.

    Attributes:
        weight: [outputs, inputs, kernel area].
        covariance: of its input patches, the mean taken out: A [inputs * area, inputs * area]. The mean's effect is a
            shift of the output, which the batch norm or bias that follows absorbs.
        fisher: diagonal of G [outputs].
        index: the group's channels among its inputs [channels, multiplicity].
    """

    weight: Tensor
    covariance: Tensor
    fisher: Tensor
    index: Tensor


@dataclass(frozen=True)
class Elimination:
    """The result of one group's greedy backward elimination.

    Attributes:
        order: channels, the first eliminated first [channels].
        cost: loss added by each elimination, in the same order [channels].
        relative: squared output error of the consumers relative to their outputs' energy, cumulative, after each
            elimination [channels].
    """

    order: Tensor
    cost: Tensor
    relative: Tensor

    @property
    def score(self) -> Tensor:
        """Loss that had been added in all when each channel was eliminated [channels]: ranks within the group."""
        return torch.empty_like(self.cost).scatter_(0, self.order, self.cost.cumsum(0))


def centred(factor: Tensor) -> Tensor:
    """Covariance (times the number of positions) of patches from a factor with the constant's row: [d, d]."""
    mean = factor[:-1, -1]
    return factor[:-1, :-1] - torch.outer(mean, mean) / factor[-1, -1]


def consumers(group: Group, network: nn.Module, factors: dict[str, Tensor]) -> list[Consumer]:
    """The group's consumers in double precision; ``factors`` holds ``<layer>/a`` and ``<layer>/g``."""
    found = []
    for member in group.with_role("consumer"):
        weight = network.get_submodule(member.layer).weight.detach().double().cpu()
        weight = weight.reshape(*weight.shape[:2], -1)
        a, g = factors[f"{member.layer}/a"].double(), factors[f"{member.layer}/g"].double()
        found.append(Consumer(weight, centred(a[0]), g[0].diagonal(), torch.tensor(member.index)))
    return found


def kfac_hessian(parts: list[Consumer], fisher: list[Tensor]) -> Tensor:
    """Kronecker-factored Hessian of closing a group's gates: H_cd = tr(G W_c A_cd W_d^T), summed over consumers.

    Its diagonal is twice the K-FAC score; with the cross terms it is the group's joint model, without compensation.

    Args:
        parts: the consumers.
        fisher: their full output factors G [outputs, outputs].

    Returns:
        [channels, channels].
    """
    total = torch.zeros(len(parts[0].index), len(parts[0].index), dtype=torch.float64)
    for part, g in zip(parts, fisher):
        weight, columns = part.weight.flatten(1), _columns(part)  # [channels, block]
        terms = (weight.T @ g.double() @ weight) * part.covariance
        rows = terms[columns.flatten()][:, columns.flatten()]
        total += rows.view(*columns.shape, *columns.shape).sum((1, 3))
    return total


def kfac_score(parts: list[Consumer], fisher: list[Tensor]) -> Tensor:
    """Kronecker-factored OBD of closing each gate: 1/2 tr(G W_c A_cc W_c^T), summed over consumers [channels]."""
    return 0.5 * kfac_hessian(parts, fisher).diagonal()


def eliminate(parts: list[Consumer], damping: float) -> Elimination:
    """Greedy backward elimination of a group's channels with compensation.

    Args:
        parts: the group's consumers; untouched.
        damping: of the covariances, relative to their mean diagonal.

    Returns:
        Order, costs and relative errors of all widths.
    """
    weights = [part.weight.flatten(1).clone() for part in parts]
    inverses = [torch.linalg.inv(damped(part.covariance, damping)) for part in parts]
    columns = [_columns(part) for part in parts]
    energy = sum(((w @ part.covariance) * w).sum() for w, part in zip(weights, parts)).clamp_min(1e-30)
    alive = torch.arange(len(parts[0].index))
    order, costs, errors = [], [], []
    while len(alive):
        cost, error = sum(_removal_errors(weight, inverse, column[alive], part.fisher)
                          for part, weight, inverse, column in zip(parts, weights, inverses, columns))
        best = int(cost.argmin())
        channel = int(alive[best])
        order.append(channel)
        costs.append(cost[best])
        errors.append(error[best])
        for weight, inverse, column in zip(weights, inverses, columns):
            _remove(weight, inverse, column[channel])
        alive = alive[alive != channel]
    return Elimination(torch.tensor(order), torch.stack(costs), torch.stack(errors).cumsum(0) / energy)


def _columns(part: Consumer) -> Tensor:
    """Columns of the flattened weight that belong to each channel [channels, multiplicity * area]."""
    area = part.weight.shape[2]
    return (part.index[:, :, None] * area + torch.arange(area)).flatten(1)


def _removal_errors(weight: Tensor, inverse: Tensor, columns: Tensor, fisher: Tensor) -> Tensor:
    """Cost and squared output error of removing each channel J, all others compensating [2, channels].

    With B = [(A^-1)_JJ]^-1 they are 1/2 tr(B W_J^T G W_J) and tr(B W_J^T W_J): products of small blocks.
    """
    block = torch.linalg.inv(inverse[columns[:, :, None], columns[:, None, :]])
    removed = weight[:, columns].transpose(0, 1)  # [channels, outputs, block]
    by_fisher, plain = (removed.mT @ part for part in (removed * (0.5 * fisher)[:, None], removed))
    return torch.stack([(block * by_fisher).sum((1, 2)), (block * plain).sum((1, 2))])


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Compensates the other columns and downdates the inverse, in place."""
    step = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])  # [block, d]
    weight -= weight[:, columns] @ step
    inverse -= inverse[:, columns] @ step
    weight[:, columns] = 0
    inverse[columns, :] = 0
    inverse[:, columns] = 0
    inverse[columns, columns] = 1  # keeps later solves of other blocks untouched and this one regular


@dataclass(frozen=True)
class Sensitivity:
    """Scores per group, ``kfac`` and ``hobs`` [channels], and the eliminations."""

    scores: dict[str, list[Tensor]]
    eliminations: list[Elimination]


def collect_factors(network: nn.Module, images: Images, options, generator: torch.Generator) -> dict[str, Tensor]:
    """Kronecker factors of all layers over calibration images, as ``<layer>/a`` and ``<layer>/g`` on the CPU.

    Args:
        network: in evaluation mode; untouched.
        images: calibration images.
        options: ``params.sensitivity`` (batch_size, positions, damping).
        generator: draws positions and labels.
    """
    kfac = KFACHessianApproximator(network, options.damping, 1, options.positions, generator)
    sweep(network, images, options.batch_size, [kfac], generator)
    return kfac.stored()


def analyse(network: nn.Module, every: Groups, factors: dict[str, Tensor], damping: float) -> Sensitivity:
    """K-FAC scores and eliminations of all groups from the factors."""
    scores: dict[str, list[Tensor]] = {"kfac": [], "hobs": []}
    eliminations = []
    for group in every:
        if not group.with_role("consumer"):  # kept whole
            nothing = torch.zeros(group.channels, dtype=torch.float64)
            eliminations.append(Elimination(torch.arange(group.channels), nothing, nothing))
            scores["kfac"].append(nothing)
            scores["hobs"].append(nothing)
            continue
        parts = consumers(group, network, factors)
        full = [factors[f"{member.layer}/g"][0] for member in group.with_role("consumer")]
        eliminations.append(eliminate(parts, damping))
        scores["kfac"].append(kfac_score(parts, full))
        scores["hobs"].append(eliminations[-1].score)
    return Sensitivity(scores, eliminations)

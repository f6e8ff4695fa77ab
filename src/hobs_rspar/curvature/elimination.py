"""Optimal Brain Surgeon on the inputs of consumers: channels are eliminated greedily, one by one.

Of every consumer it needs the weight, the covariance A of its inputs and the diagonal of G; see
:mod:`hobs_rspar.curvature.hobs` for the formula. A^-1 is downdated after each channel, so that the cost of n channels
grows with n^4: large groups go by :mod:`hobs_rspar.curvature.pools`, which is compared with this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hobs_rspar.curvature.kfac import damped


@dataclass(frozen=True)
class Consumer:
    """What H-OBS needs of one consumer of a group.

    Attributes:
        weight: [outputs, inputs, kernel area].
        covariance: of its input patches, the mean taken out: A [inputs * area, inputs * area]. The mean's effect is a
            shift of the output, which the batch norm or bias that follows absorbs.
        fisher: diagonal of G [outputs].
        index: the group's channels among its inputs [channels, multiplicity].
        channels: which channels of the group those are, where it does not read all of them.
        source: the layer, and which of its convolution groups this is.
        block: columns of that group's flattened weight that these are, where they are not all.
    """

    weight: Tensor
    covariance: Tensor
    fisher: Tensor
    index: Tensor
    channels: Tensor | None = None
    source: tuple[str, int] = ("", 0)
    block: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """Columns of the flattened weight that belong to each channel [channels, multiplicity * area]."""
        area = self.weight.shape[2]
        return (self.index[:, :, None] * area + torch.arange(area)).flatten(1)

    @property
    def energy(self) -> Tensor:
        """Sum of its outputs' variances."""
        weight = self.weight.flatten(1)
        return ((weight @ self.covariance) * weight).sum()


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

    @classmethod
    def of_scores(cls, scores: Tensor) -> Elimination:
        """What single scores [channels], not negative, tell: the lowest goes first, and their sums stand for errors."""
        order = torch.argsort(scores, stable=True)
        cost = scores[order].double()
        return cls(order, cost, cost.cumsum(0) / cost.sum().clamp_min(1e-30))


def one_by_one(parts: Sequence[Consumer], damping: float) -> Elimination:
    """Greedy backward elimination of a group's channels with compensation.

    Args:
        parts: the group's consumers, each of which reads all channels; untouched.
        damping: of the covariances, relative to their mean diagonal.

    Returns:
        Order, costs and relative errors of all widths.
    """
    weights = [part.weight.flatten(1).clone() for part in parts]
    inverses = [torch.linalg.inv(damped(part.covariance, damping)) for part in parts]
    columns = [part.columns for part in parts]
    energy = sum(part.energy for part in parts).clamp_min(1e-30)
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

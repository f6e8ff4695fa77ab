"""Least squares of single layers: the weight that gives wanted outputs from the inputs that are left.

Either from all rows at once, or from sums over batches of them. A layer that has few rows for its inputs, such as a
classifier that sees one for each image, is pulled to the weight that it has, and not to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hobs_rspar.curvature.kfac import damped

FEW = 4  # rows for each input, below which the ridge pulls to the weight that a layer has


def ridge_solution(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight [outputs, d] that minimises the squared error plus a ridge relative to the mean diagonal.

    Args:
        gram: of the inputs [d, d].
        cross: of inputs and wanted outputs [d, outputs].
        ridge: see above.
    """
    return torch.linalg.solve(damped(gram, ridge), cross).T


def refit(layer: nn.Module, rows: Tensor, target: Tensor, ridge: float) -> float:
    """Gives a layer the weight, and the bias if there is one, that makes ``target`` of ``rows``.

    Args:
        layer: convolution or linear; changed in place.
        rows: its input patches with the constant at the end [groups, n, d + 1].
        target: wanted outputs without the bias [n, outputs].
        ridge: relative to the mean diagonal of the inputs' covariance.

    Returns:
        The relative squared error on the rows themselves.
    """
    befores = layer.weight.detach().reshape(len(rows), len(layer.weight) // len(rows), -1)
    parts = [_solved(own[:, :-1], wanted, before, ridge)
             for own, wanted, before in zip(rows, _by_group(target, len(rows)), befores)]
    return _put(layer, parts, layer.bias)


def _solved(x: Tensor, target: Tensor, before: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and shift of one convolution group, its squared error and the wanted outputs' energy."""
    centre, level = x.mean(0), target.mean(0)
    x, y = x - centre, target - level  # products in float32, once the means are out; the solution in double
    few = len(x) < FEW * x.shape[1]
    wanted = y - x @ before.T if few else y
    if len(x) < x.shape[1]:  # the same solution from the rows' own products, which are fewer
        gram = (x @ x.T).double()
        gram.diagonal().add_(ridge * gram.diagonal().sum() / x.shape[1])
        weight = (torch.linalg.solve(gram, wanted.double()).T @ x.double()).float()
    else:
        weight = ridge_solution((x.T @ x).double(), (x.T @ wanted).double(), ridge).float()
    weight = before + weight if few else weight
    return weight, level - weight @ centre, (x @ weight.T - y).square().sum(), y.square().sum()


class Moments:
    """Sums over batches of rows, from which a layer is refitted, if need be after each.

    Args:
        layer: convolution or linear, with the weight and bias that it has without a refit.
    """

    def __init__(self, layer: nn.Module):
        self.layer, self.count = layer, 0
        self.bias = None if layer.bias is None else layer.bias.detach().clone()
        self.weight = layer.weight.detach().clone()

    def add(self, rows: Tensor, target: Tensor) -> None:
        """Takes a batch of rows as :func:`refit` does; sums are taken relative to the first batch's means."""
        x, y = rows[..., :-1], torch.stack(_by_group(target, len(rows)))
        if self.count == 0:
            self.centre, self.level = x.mean(1), y.mean(1)
            both = self.centre.shape[-1], self.level.shape[-1]
            self.sums = [x.new_zeros(len(x), 1, size) for size in both]
            self.gram, self.cross = (x.new_zeros(len(x), both[0], size) for size in both)
            self.energy = x.new_zeros(len(x), 1, both[1])
        x, y = x - self.centre[:, None], y - self.level[:, None]
        self.count += x.shape[1]
        for total, part in zip((*self.sums, self.energy), (x, y, y.square())):
            total += part.sum(1, keepdim=True)
        self.gram.baddbmm_(x.mT, x)
        self.cross.baddbmm_(x.mT, y)

    def refit(self, ridge: float) -> float:
        """As :func:`refit`, on all rows that were taken."""
        befores = self.weight.reshape(len(self.gram), len(self.weight) // len(self.gram), -1)
        return _put(self.layer, [self._solved(i, before, ridge) for i, before in enumerate(befores)], self.bias)

    def _solved(self, i: int, before: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = (total[i].double() / self.count for total in self.sums)
        gram = self.gram[i].double() - self.count * x.T @ x
        cross = self.cross[i].double() - self.count * x.T @ y
        energy = (self.energy[i].double() - self.count * y.square()).sum()
        before = before.double() if self.count < FEW * len(gram) else torch.zeros_like(before, dtype=torch.float64)
        weight = before + ridge_solution(gram, cross - gram @ before.T, ridge)
        error = energy - 2 * (cross * weight.T).sum() + ((weight @ gram) * weight).sum()
        shift = self.level[i] + y[0] - weight @ (self.centre[i] + x[0])
        return weight.float(), shift.float(), error.clamp_min(0), energy


def _by_group(target: Tensor, groups: int) -> list[Tensor]:
    """Outputs [n, outputs] of every convolution group."""
    return list(target.unflatten(1, (groups, -1)).unbind(1))


@torch.no_grad()
def _put(layer: nn.Module, parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], bias: Tensor | None) -> float:
    """Sets the weight, and the bias to ``bias`` and the shift; relative squared error."""
    weights, shifts, errors, energies = zip(*parts)
    if bias is not None:
        layer.bias.copy_(bias + torch.cat(shifts).to(bias))
    layer.weight.copy_(torch.cat(weights).view_as(layer.weight))
    return (sum(errors) / sum(energies).clamp_min(1e-12)).item()

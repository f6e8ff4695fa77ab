"""Labels: for every element of an activation the channel that it belongs to, as an int64 tensor of the same shape.

-1 is an element that belongs to no channel, -2 one that would go with any. Most labels depend on one dimension only;
they are held as expanded views (stride 0), and :func:`compact` takes such dimensions out before anything is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1
ANY = -2  # random numbers, which are drawn for as many channels as there are


@dataclass(frozen=True)
class Part:
    """A tensor that is a view of a parameter or buffer, or has been computed from one element by element.

    Attributes:
        name: of the parameter or buffer.
        coordinates: axis of the parameter (longer than 1) -> index on it of every element.
    """

    name: str
    coordinates: dict[int, Tensor]


def along(nodes: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Labels of ``shape`` that depend on one dimension only."""
    sizes = [1] * len(shape)
    sizes[dim] = len(nodes)
    return nodes.view(sizes).expand(*shape)


def compact(*labels: Tensor, keep: int | None = None) -> list[Tensor]:
    """The same labels [all of one shape] without the dimensions along which none changes; ``keep`` stays as it is."""
    labels = list(labels)
    for dim in range(labels[0].dim()):
        if dim != keep and labels[0].shape[dim] > 1 and all(part.stride(dim) == 0 for part in labels):
            labels = [part.narrow(dim, 0, 1) for part in labels]
    return labels


def varying(labels: Tensor) -> list[int]:
    """Dimensions along which labels change, elements without a channel left out."""
    labels, found = compact(labels)[0], []
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            low, high = spread(labels, [dim])
            found += [dim] if bool((low != high).any()) else []
    return found


def spread(labels: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lowest and highest label over some dimensions, which stay with length 1; both -1 where there is none."""
    high = labels.amax(dims, keepdim=True)
    low = torch.where(labels < 0, torch.iinfo(torch.int64).max, labels).amin(dims, keepdim=True)
    return torch.where(high < 0, high, low), high


def rows(labels: Tensor, dim: int) -> Tensor:
    """Labels as [length of ``dim``, everything else that differs]."""
    return compact(labels, keep=dim % labels.dim())[0].movedim(dim, 0).reshape(labels.shape[dim], -1)

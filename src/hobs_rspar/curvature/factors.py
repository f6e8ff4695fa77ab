"""Running sums of Kronecker factors, those of very wide layers in blocks of the diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WHOLE, BLOCK = 8192, 4096  # columns up to which A is one matrix, and of its blocks where it would have more


@dataclass
class Factors:
    """Running sums of one layer.

    Attributes:
        a: input factor [groups * blocks, b + 1, b + 1]; of one block, b = d = inputs per group x kernel area.
        g: output factor [groups, outputs per group, outputs per group], or its diagonal [outputs].
        columns: of the flattened weight in every block [blocks, b], -1 where a block is not full; None: one block.
        images: images summed.
    """

    a: Tensor
    g: Tensor
    columns: Tensor | None
    images: int = 0


def column_blocks(layer: nn.Module, channel_of: Tensor | None) -> Tensor | None:
    """Columns of a layer's flattened weight in blocks of whole channels [blocks, b]; None: all in one.

    Args:
        layer: convolution or linear.
        channel_of: the number of every input's channel [inputs]; None: every input is one.
    """
    inputs, d = layer.weight.shape[1], layer.weight[0].numel()
    if d <= WHOLE:
        return None
    numbers = torch.arange(inputs) if channel_of is None else channel_of[:inputs]
    order = torch.argsort(numbers, stable=True)
    _, counts = torch.unique_consecutive(numbers[order], return_counts=True)
    parts, room = [[]], 0
    for channel in order.split(counts.tolist()):
        size = len(channel) * d // inputs
        if parts[-1] and size > room:
            parts.append([])
        room = (BLOCK if not parts[-1] else room) - size
        parts[-1].append(channel)
    flat = [(torch.cat(part)[:, None] * (d // inputs) + torch.arange(d // inputs)).flatten() for part in parts]
    return torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=-1)


def accumulate(kept: Factors, rows: Tensor, scale: float) -> None:
    """Adds scale x the patches' second moments to A, block by block."""
    if kept.columns is None:
        kept.a.add_(rows.mT @ rows, alpha=scale)
        return
    blocks = len(kept.columns)
    for number, columns in enumerate(kept.columns):
        own = columns[columns >= 0].to(rows.device)
        part = torch.cat([rows[..., own], rows[..., -1:]], -1)
        places = torch.cat([torch.arange(len(own)), torch.tensor([kept.a.shape[-1] - 1])]).to(rows.device)
        for group, outer in enumerate(scale * part.mT @ part):
            kept.a[group * blocks + number, places[:, None], places] += outer


def input_diagonal(factors: Mapping[str, Tensor], name: str, layer: nn.Module) -> Tensor:
    """Diagonal of a layer's A [groups, d + 1], of one block or of several."""
    diagonal = factors[f"{name}/a"].diagonal(dim1=1, dim2=2)
    columns = factors.get(f"{name}/columns")
    if columns is None:
        return diagonal
    parts = diagonal.view(-1, len(columns), diagonal.shape[1])
    found = parts.new_zeros(len(parts), layer.weight[0].numel() + 1)
    found[:, columns[columns >= 0]] = parts[:, :, :-1][:, columns >= 0]
    found[:, -1] = parts[:, 0, -1]
    return found


def fisher_diagonal(factors: Mapping[str, Tensor], name: str) -> Tensor:
    """Diagonal of a layer's G [outputs], whether all of it is there or that alone."""
    whole = factors.get(f"{name}/g")
    return factors[f"{name}/fisher"] if whole is None else whole.diagonal(dim1=1, dim2=2).flatten()

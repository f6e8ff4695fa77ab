"""Random images with the values of an example: no negative ones for a logarithm, whole ones for an embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def images_like(example: Tensor, count: int, seed: int) -> Tensor:
    """Images whose every value is one of the example's first image, of the same channel [count, C, ...].

    Args:
        example: input [n, C, ...]; where it is the same everywhere, values are normal.
        count: of images.
        seed: of what is drawn.
    """
    random = torch.Generator().manual_seed(seed)
    values = example[0].detach().flatten(1) if example.dim() > 2 else example[:1].detach()
    if values.numel() == 0 or bool((values == values[:, :1]).all()):
        return torch.randn(count, *example.shape[1:], generator=random).to(example)
    drawn = torch.randint(values.shape[1], (count, *values.shape), generator=random).to(values.device)
    return values.expand(count, *values.shape).gather(2, drawn).view(count, *example.shape[1:])

"""From a user's DataLoader to images in memory: what the public API works on."""

from __future__ import annotations

from itertools import islice

import torch

from hobs_rspar.data import Images
from hobs_rspar.errors import UserError


def from_loader(dataloader, batches: int | None = None) -> tuple[Images, int]:
    """The first batches of a loader, which must yield (images, labels) with images as the network wants them.

    Args:
        dataloader: yields (float [n, C, H, W], int [n]).
        batches: how many to take; None takes all.

    Returns:
        The images, as they are (mean 0, unit scale), and the size of the first batch.

    Raises:
        UserError: the loader yields nothing, or something else.
    """
    taken = list(islice(dataloader, batches))
    if not taken:
        raise UserError("the dataloader is empty; give one that yields (images, labels)")
    first = taken[0]
    if not isinstance(first, (tuple, list)) or len(first) != 2 or getattr(first[0], "ndim", 0) != 4:
        raise UserError("the dataloader must yield (images [n, C, H, W], labels [n]); it yields "
                        f"{type(first).__name__}")
    pixels = torch.cat([batch[0] for batch in taken]).float()
    labels = torch.cat([batch[1] for batch in taken]).long()
    channels = pixels.shape[1]
    return Images(pixels, labels, torch.zeros(channels), torch.full((channels,), 1 / 255),
                  torch.contiguous_format), len(first[1])

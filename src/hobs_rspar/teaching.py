"""What the dense network answers to the images of a recovery, computed once for all methods of a seed.

Order, crops and flips depend on (seed, stage, epoch) alone, so every method of a seed trains on the very same images,
and the teacher says the same about them. Asking it anew takes a fifth to two fifths of a pruned network's recovery.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hobs_rspar.checkpoint import load_tensors, save_tensors
from hobs_rspar.device import autocast
from hobs_rspar.folding import folded

MOST = 2**27  # bytes of one epoch's answers; above it (a million images of 1,000 classes) they are computed every time

Teach = Callable[[Tensor], Tensor]


@contextmanager
def answers(teacher: nn.Module, precision: str, image: Tensor, steps: int, kept: Path | None) -> Iterator[Teach]:
    """The teacher of one epoch: logits [batch, classes], float32, of one batch after the other.

    Args:
        teacher: in evaluation mode.
        precision: of its forward passes.
        image: one image [1, C, H, W], normalised.
        steps: batches of the epoch.
        kept: file of this epoch's answers, read if it is there, else written once the epoch is over; None: no file.
    """
    if kept is not None and kept.is_file():
        known = iter(load_tensors(kept)[0]["logits"])
        yield lambda x: next(known).to(x.device)
        return
    said: list[Tensor] = []

    @torch.no_grad()
    def teach(x: Tensor) -> Tensor:
        with autocast(x.device, precision):
            out = teacher(x).float()
        if kept is not None and steps * out.nbytes <= MOST:
            said.append(out)
        return out

    with folded(teacher, image):  # without batch norms of its own it is a third faster
        yield teach
    if len(said) == steps:
        save_tensors(kept, {"logits": torch.stack(said).cpu()})

"""StructAlign as the source documents describe it: learnt importance vectors whose distributions are aligned by KL.

Paper: Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023, in which there
is no such term; hence ``_seed``. Changed so that the term is defined and a gradient reaches the vectors: vectors of
neighbouring groups differ in length, so their sorted values are compared, resampled to 32; and they multiply what
consumers read. As documented: vectors begin at 1; loss + 0.1 times the sum over neighbours of KL(softmax of one ||
softmax of the next); the largest of each layer stay, at uniform widths.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from hobs_rspar.methods import _gated
from hobs_rspar.methods._gated import Options
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]

KL = 0.1  # weight of the term, as documented
BINS = 32


def plan(context: Context, options: Options) -> PruningPlan:
    network, sizes = copy.deepcopy(context.network), context.groups.sizes.tolist()
    vector = torch.ones(sum(sizes), device=next(network.parameters()).device, requires_grad=True)
    images = _gated.alternate(network, context, options, [vector], lambda: vector,
                              lambda gates: KL * misalignment(gates.split(sizes)), context.train)
    widths = context.space.uniform
    return context.keep_best(context.per_group(vector.detach().cpu().double()), widths,
                             "importance vectors aligned by KL, uniform widths", trained=network, images=images)


def misalignment(vectors: tuple[Tensor, ...]) -> Tensor:
    """Sum over neighbouring groups of KL(softmax of one || softmax of the next), both sorted and resampled."""
    logs = [F.interpolate(vector.sort().values[None, None], BINS, mode="linear", align_corners=True)[0, 0]
            .log_softmax(0) for vector in vectors]
    return sum((F.kl_div(after, before, reduction="sum", log_target=True) for before, after in zip(logs, logs[1:])),
               torch.zeros(()))

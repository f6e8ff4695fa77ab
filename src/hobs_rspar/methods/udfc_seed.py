"""UDFC as the source documents describe it: channels at even strides down the ranking by L1 norm, at uniform widths.

Paper: Bai et al., Unified Data-Free Compression: Pruning and Quantization without Fine-Tuning, ICCV 2023. None of it is
left in the documents' version, hence ``_seed``: there is no closed-form compensation, and no stride in the paper. Where
more than half of a group is kept the stride is 1 and this is ``l1``; where less is kept, unimportant channels stay on
purpose.
"""

import torch
from torch import Tensor

from hobs_rspar.config import Section
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    widths = context.space.uniform
    norms = filter_norms(context.network, context.groups, 1)
    scores = [strided(norm, int(width)) for norm, width in zip(norms, widths)]
    return context.keep_best(scores, widths, "even strides down the ranking by L1 norm, uniform widths")


def strided(norms: Tensor, width: int) -> Tensor:
    """1 for every s-th channel of the ranking from the top, s = channels // width, ``width`` of them; else 0."""
    taken = torch.argsort(-norms, stable=True)[::max(1, len(norms) // width)][:width]
    return torch.zeros_like(norms).index_fill_(0, taken, 1.0)

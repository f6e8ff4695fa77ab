"""LAMP for channels: squared norm relative to all that is at least as large in the group, one threshold for all groups.

Paper: Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021. Faithful: the score, w^2 over the
sum of w^2 of what has not gone before it, which ranks all layers together without a rate for each and always keeps one.
Changed, as in torch-pruning: the paper prunes single weights; here w^2 is the squared norm of a channel's filters, over
all producers of its group. The paper prunes and trains in turns; here it is done once. The paper has no structured
results.
"""

import torch
from torch import Tensor

from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.config import Section
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    scores = [share_of_the_rest(norm.square()) for norm in filter_norms(context.network, context.groups, 2)]
    widths = threshold_widths(context.space, scores)
    return context.keep_best(scores, widths, "LAMP score of the L2 norm, global threshold")


def share_of_the_rest(squared: Tensor) -> Tensor:
    """Each value over the sum of itself and all that are larger [channels]; of equal ones the first goes first."""
    values, order = torch.sort(squared, stable=True)
    rest = values.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
    return torch.empty_like(squared).scatter_(0, order, values / rest)

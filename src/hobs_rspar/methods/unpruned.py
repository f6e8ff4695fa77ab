"""Unpruned: keeps every channel and goes through the same recovery as all methods.

Not a competitor but the paired reference: what recovery alone does to the dense network.
"""

import torch

from hobs_rspar.config import Section
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    scores = [torch.zeros(group.channels) for group in context.groups]
    return context.keep_best(scores, context.groups.sizes, "keeps everything")

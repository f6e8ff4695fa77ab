"""Random channels at uniform widths: the control that every criterion must beat.

Faithful: nothing to be faithful to. Channels are drawn anew for every seed.
"""

import torch

from hobs_rspar.config import Section
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    scores = [torch.rand(group.channels, generator=context.generator) for group in context.groups]
    widths = context.space.uniform
    return context.keep_best(scores, widths, "random channels, uniform widths")

"""Random channels with repair: the channels of ``random`` for the same seed, and the consumers refitted.

A control: repair must not pass for the criterion. Every criterion with repair must beat this; the difference to
``random`` is what repair alone is worth. Repair: least-squares refit of the consumers.
"""

import torch

from hobs_rspar.config import Section
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.seeds import generator


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    same = generator(context.seed, "allocate", "random")  # its channels, so that the two differ by repair alone
    scores = [torch.rand(group.channels, generator=same) for group in context.groups]
    widths = context.space.uniform
    return context.keep_best(scores, widths, "random channels, uniform widths, repaired", repair="least_squares")

"""L2 global: filters with the smallest L2 norm, relative to their group's mean, go first over the whole network.

A common control (the strongest plain criterion of PruningBench on ResNet-50 at high rates). One threshold for all
groups; the norm is divided by its group's mean, because raw norms of different layers cannot be compared.
"""

from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.config import Section
from hobs_rspar.criteria import filter_norms, normalised
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    scores = normalised(filter_norms(context.network, context.groups, 2))
    widths = threshold_widths(context.space, scores)
    return context.keep_best(scores, widths, "L2 norm relative to the group's mean, global threshold")

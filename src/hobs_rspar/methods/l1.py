"""L1: filters with the smallest L1 norm go first, at uniform widths.

Paper: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017. Faithful: the norm. Simplified: uniform widths
instead of the paper's hand-set ones; in residual streams the norms of all producers are summed.
"""

from hobs_rspar.config import Section
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    widths = context.space.uniform
    return context.keep_best(filter_norms(context.network, context.groups, 1), widths, "L1 norm, uniform widths")

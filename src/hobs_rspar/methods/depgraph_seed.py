"""DepGraph as the source documents describe it: group L2 norm, uniform widths, no sparse training.

Paper: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. Faithful: dependency groups and the norm over
all parameters that a channel takes with it. Left out, as in the documents: the group sparse training that the paper's
results rest on; hence ``_seed``.
"""

from hobs_rspar.config import Section
from hobs_rspar.criteria import group_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    widths = context.space.uniform
    return context.keep_best(group_norms(context.network, context.groups), widths, "group L2 norm, uniform widths")

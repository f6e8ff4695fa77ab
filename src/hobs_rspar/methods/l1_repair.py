"""L1 with repair: the channels of ``l1``, and the consumers refitted as for ``hobs_rspar``.

A control: repair must not pass for the criterion. The difference to ``l1`` is what repair is worth, the difference of
``hobs_uniform`` to this is what the criterion is worth. Criterion: Li et al., Pruning Filters for Efficient ConvNets,
ICLR 2017, simplified as in ``l1``. Repair: least-squares refit of the consumers.
"""

from hobs_rspar.config import Section
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    widths = context.space.uniform
    return context.keep_best(filter_norms(context.network, context.groups, 1), widths,
                             "L1 norm, uniform widths, repaired", repair="least_squares")

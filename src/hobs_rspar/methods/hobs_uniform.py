"""H-OBS with uniform widths: the criterion and the repair of the method, without its search.

Criterion: structured Optimal Brain Surgeon on the consumers' inputs with Kronecker factors (curvature/hobs.py).
Repair: least-squares refit of the consumers. The difference to ``hobs_rspar`` is what the search is worth.
"""

from hobs_rspar.config import Section
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan


class Options(Section):
    """No options."""


def plan(context: Context, options: Options) -> PruningPlan:
    scores = context.per_group(context.sensitivity["hobs"])
    widths = context.space.uniform
    return context.keep_best(scores, widths, "H-OBS, uniform widths", repair="least_squares")

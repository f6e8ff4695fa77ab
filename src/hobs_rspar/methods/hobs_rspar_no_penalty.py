"""Ablation of H-OBS/R-SPAR: no penalty. The reward of the search is minus the accuracy drop alone (lambda = 0).

Criterion, allocator and repair: as ``hobs_rspar``. The difference to it is what the penalty lambda(t) of the raw action
is worth.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    without = options.model_copy(update={"penalty": 0.0, "penalty_min": 0.0})
    return searched(context, without, scores, relative, "H-OBS")

"""Ablation of H-OBS/R-SPAR: first order instead of second. Channels are ordered by the Taylor score of their gates.

Allocator and repair: as ``hobs_rspar``; sums of single scores stand in for the predicted loss and the relative error
that the search starts from. The difference to ``hobs_rspar`` is what second-order information is worth.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, first_removed, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores = context.per_group(context.sensitivity["taylor"])
    return searched(context, options, *first_removed(scores), "squared gate gradient")

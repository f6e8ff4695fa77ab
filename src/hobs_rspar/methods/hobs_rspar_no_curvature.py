"""Ablation of H-OBS/R-SPAR: no curvature. Channels are ordered by the L1 norm of their filters.

Allocator and repair: as ``hobs_rspar``; sums of norms stand in for the predicted loss and the relative error that the
search starts from. The difference to ``hobs_rspar`` is what the criterion is worth when all else is equal.
"""

from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, first_removed, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    return searched(context, options, *first_removed(filter_norms(context.network, context.groups, 1)), "L1 norm")

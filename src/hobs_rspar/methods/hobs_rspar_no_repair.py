"""Ablation of H-OBS/R-SPAR: no repair. The consumers keep their weights, in the plan and while the search measures.

Criterion: H-OBS. Allocator: as ``hobs_rspar``, plans measured after batch norms are re-estimated. The difference to
``hobs_rspar`` is what the least-squares refit is worth.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    return searched(context, options, scores, relative, "H-OBS", repair="batchnorm")

"""Ablation of H-OBS/R-SPAR: PPO without penalty. Its reward is minus the accuracy drop alone (lambda = 0).

Criterion, allocator and repair: as ``hobs_rspar_ppo``. The difference to it is what the penalty lambda(t) of the raw
action is worth.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    without = options.model_copy(update={"allocator": "ppo", "penalty": 0.0, "penalty_min": 0.0})
    return searched(context, without, scores, relative, "H-OBS")

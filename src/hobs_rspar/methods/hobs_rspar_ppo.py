"""H-OBS with R-SPAR as published: PPO with the adaptive penalty proposes the widths, in place of local search.

Criterion, measurements and repair: as ``hobs_rspar``. Allocator: R-SPAR (allocation/rspar.py), an agent that chooses
one kept ratio after the other, on the reward that is fitted to measured plans. The difference to ``hobs_rspar`` is what
local search on the same reward is worth.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    return searched(context, options.model_copy(update={"allocator": "ppo"}), scores, relative, "H-OBS")

"""H-OBS with deep Q-learning (Mnih et al. 2015) in place of PPO: R-SPAR's decision process, another agent.

Criterion, measurements, states, rewards, number of episodes and repair: as ``hobs_rspar_ppo``. Allocator: DQN with
replay memory and target network, which chooses one of twenty kept ratios for each group (allocation/dqn.py). The
difference to ``hobs_rspar_ppo`` is the agent's.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    return searched(context, options.model_copy(update={"allocator": "dqn"}), scores, relative, "H-OBS")

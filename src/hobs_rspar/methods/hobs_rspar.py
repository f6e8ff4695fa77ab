"""H-OBS/R-SPAR: second-order sensitivity of coupled channels, and widths from a search that measures.

Criterion: structured Optimal Brain Surgeon on the consumers' inputs with Kronecker factors (curvature/hobs.py).
Allocator: local search on a reward by look-up that is fitted to plans which were pruned, repaired and run on validation
images; what it chooses was run (allocation/measured_search.py). R-SPAR's own agent, PPO with an adaptive penalty, is
``allocator: ppo``, and a method of its own, ``hobs_rspar_ppo``: claim C8 compares the two at equal cost, and the better
one is the default. Repair: least-squares refit of the consumers. The source documents' formulas that contradict their
own claims (w^2 H_ii called OBS, lambda(t) without t) are implemented as what they name; see docs/methods.md.
"""

from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._rspar import Options, searched
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]


def plan(context: Context, options: Options) -> PruningPlan:
    scores, relative = (context.per_group(context.sensitivity[name]) for name in ("hobs", "relative"))
    return searched(context, options, scores, relative, "H-OBS")

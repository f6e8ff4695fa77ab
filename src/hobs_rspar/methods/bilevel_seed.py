"""Bi-Level as the source documents describe it: masks learnt on held-out images with an L1 term, and a quantile cut.

Paper: Gao et al., BilevelPruning, CVPR 2024, of which this has only the name; hence ``_seed``. Changed so that it
prunes structures: one mask value for every coupled channel instead of every weight, on what consumers read. As
documented: the lower level trains weights under the masks by SGD, the upper level masks by Adam on the held-out loss
+ 1e-4 times their L1 norm; one quantile of all mask values for the whole network. Their held-out images were the ones
they reported on; here they are the calibration images.
"""

from __future__ import annotations

import copy

import torch

from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.methods import _gated
from hobs_rspar.methods._gated import Options
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]

L1 = 1e-4  # weight of the masks' L1 norm, as documented


def plan(context: Context, options: Options) -> PruningPlan:
    network = copy.deepcopy(context.network)
    mask = torch.ones(int(context.groups.sizes.sum()), device=next(network.parameters()).device, requires_grad=True)
    images = _gated.alternate(network, context, options, [mask], lambda: mask,
                              lambda gates: L1 * gates.abs().sum(), context.calibration)
    scores = context.per_group(mask.detach().cpu().double().abs())
    widths = threshold_widths(context.space, scores)
    return context.keep_best(scores, widths, "masks learnt on held-out images, one quantile", trained=network,
                             images=images)

"""Bi-Level, a stand-in: gates learn on held-out images while weights learn on training images.

Paper: Gao et al., BilevelPruning: Unified Dynamic and Static Channel Pruning for Convolutional Neural Networks, CVPR
2024. Its text was not at hand, only the abstract; so this is NOT the published method, but what the abstract's static
part suggests: the upper level minimises the loss on held-out images (calibration) plus
lambda log(max(MACs, budget) / budget) over the gates, the lower level takes one SGD step on the weights under the same
gates on training images. Gates: Gumbel-sigmoid with the straight-through gradient, one logit for every coupled channel.
Left out: input-dependent gates, whose average MACs could not be compared with ours. No published figures are quoted.
"""

from __future__ import annotations

import copy

import torch

from hobs_rspar.methods import _gated
from hobs_rspar.methods._gated import Options
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]

STRENGTH = 4.0  # lambda, as in structalign


def plan(context: Context, options: Options) -> PruningPlan:
    network = copy.deepcopy(context.network)
    device = next(network.parameters()).device
    logits = torch.full((int(context.groups.sizes.sum()),), _gated.OPEN, device=device, requires_grad=True)
    macs = _gated.Macs(context.groups, device)
    images = _gated.alternate(network, context, options, [logits], lambda: _gated.sampled(logits, context.generator),
                              lambda gates: STRENGTH * macs.overshoot(gates, context.space.budget),
                              context.calibration)
    return _gated.planned(context, logits, network, images,
                          "gates learnt on held-out images, weights under them (stand-in)")

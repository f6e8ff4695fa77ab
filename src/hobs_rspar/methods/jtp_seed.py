"""JTP as the source documents describe it: a learnt threshold per layer on the size of its weights.

Paper: Ganjdanesh et al., Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment, CVPR 2024,
whose reinforcement learning the documents replace; hence ``_seed``. Changed so that it prunes structures and that a
gradient reaches the thresholds: filters' L2 norms n relative to their group's mean instead of single weights, gates
sigmoid((n - t) / T), T = 1, on what consumers read, in place of a mask written into the weights. As documented: t
begins at the mean, weights and thresholds are trained together (Adam for t), on the loss and a MACs term; kept is
what lies above its threshold, projected on the budget.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from hobs_rspar.criteria import filter_norms, normalised
from hobs_rspar.methods import _gated
from hobs_rspar.methods._gated import Options
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

__all__ = ["Options", "plan"]

STRENGTH = 4.0  # of the MACs beside the loss; the documents give none, structalign's is taken
TEMPERATURE = 1.0  # T, as documented


def plan(context: Context, options: Options) -> PruningPlan:
    network, groups = copy.deepcopy(context.network), context.groups
    device = next(network.parameters()).device
    thresholds, macs = torch.ones(len(groups), device=device, requires_grad=True), _gated.Macs(groups, device)
    owner = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups.sizes)).to(device)

    def above() -> Tensor:
        norms = torch.cat(normalised(filter_norms(network, groups, 2))).float().to(device)
        return norms - thresholds[owner]

    images = _gated.alternate(network, context, options, [thresholds],
                              lambda: torch.sigmoid(above() / TEMPERATURE),
                              lambda gates: STRENGTH * macs.overshoot(gates, context.space.budget), context.train)
    return _gated.planned(context, above(), network, images, "L2 norm above a learnt threshold per group")

"""DepGraph: group sparse training, then the normalised group norm, removed step by step, one threshold for all groups.

Paper: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023. Faithful: dependency groups; the norm over all
parameters that a channel takes with it; sparse training, in which every parameter is pulled to zero with the strength
2^(alpha (Imax - I) / (Imax - Imin)) of its channel's norm I within the group, alpha = 4; norms relative to the group's
largest (as the authors' code does) compared over the whole network; removal in steps, after each of which norms are
taken over what is left. Simplified: one short epoch instead of 100 (counted and shown), with a stronger pull to make up
for it; 20 steps instead of 400; in place of the authors' budget of speed-up, the study's budget of MACs and its floors.
Published: ResNet-56 on CIFAR-10 93.53 to 93.77 % at 2.11x, ResNet-50 on ImageNet 76.15 to 75.83 % at 1.99 G MACs.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import group_norms, weights
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import NonNegative, TrainingOptions, batches, close, training_loss
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate

STEPS = 20  # of removal


class Options(TrainingOptions):
    """Options of the sparse training; params.yaml says what each is for."""

    strength: NonNegative = 0.02
    alpha: NonNegative = 4.0


def plan(context: Context, options: Options) -> PruningPlan:
    network = copy.deepcopy(context.network)
    seen = sparse_training(network, context, options)
    norms, widths = removed_in_steps(network, context)
    return context.keep_best(norms, widths, "normalised group norm after sparse training, global threshold in steps",
                             trained=network, images=seen)


def sparse_training(network: nn.Module, context: Context, options: Options) -> int:
    """Trains ``network`` with the pull towards zero; the images seen."""
    data = batches(context.train, options.batch_size, context.generator)
    descent = SGD(network, options, {})
    for step in bar(range(options.steps), "sparse training"):
        training_loss(network, next(data)).backward()
        pull(network, context.groups, options)
        descent.step(learning_rate(options, step, options.steps))
    network.eval()
    return options.steps * options.batch_size


@torch.no_grad()
def pull(network: nn.Module, groups: Groups, options: Options) -> None:
    """Adds to the gradient of every weight of a group: strength x its channel's gamma x the weight."""
    for group, norms in zip(groups, group_norms(network, groups)):
        gamma = strengths(norms, options.alpha) * options.strength
        for member in group.members if not group.protected else ():
            for weight, axis, places in weights(network, member):
                if weight.grad is not None:  # a frozen weight has none
                    weight.grad += spread(gamma, weight, axis, places) * weight


def strengths(norms: Tensor, alpha: float) -> Tensor:
    """2^(alpha (Imax - I) / (Imax - Imin)) of a group's channels [channels]; 1 where all are equal."""
    squared = norms.square()
    span = squared.max() - squared.min()
    return 2 ** (alpha * (squared.max() - squared) / span.clamp_min(1e-30))


def spread(gamma: Tensor, weight: Tensor, axis: int, places: list[list[int]]) -> Tensor:
    """A channel's strength at all of its places in a weight, shaped to multiply it; 0 where the group has none."""
    values = torch.zeros(weight.shape[axis], dtype=gamma.dtype)
    values[torch.tensor(places)] = gamma[:, None]
    return values.view([-1 if dimension == axis else 1 for dimension in range(weight.dim())]).to(weight)


def removed_in_steps(network: nn.Module, context: Context) -> tuple[list[Tensor], np.ndarray]:
    """Norms relative to the group's largest, those of channels that are gone 0, and the widths [groups] at the end."""
    space, groups, left = context.space, context.groups, copy.deepcopy(network)
    for step in range(1, STEPS + 1):
        norms = [norm / norm.max().clamp_min(1e-30) for norm in group_norms(left, groups)]
        tolerance = space.tolerance if step == STEPS else 1.0  # on the way, no exact budget is needed
        now = replace(space, budget=1 - (1 - space.budget) * step / STEPS, tolerance=tolerance)
        widths = threshold_widths(now, norms)
        if step < STEPS:
            for group, norm, width in zip(groups, norms, widths):
                close(left, group, torch.argsort(norm, stable=True)[:group.channels - int(width)].tolist())
    return norms, widths

"""Taylor: gates scored by the squared gradient of each minibatch while the network trains, a few removed at a time.

Paper: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019. Faithful: the gate of a channel,
whose gradient at 1 is summed over positions and over a minibatch and then squared; the average over minibatches with
momentum 0.9; removal every few minibatches with training in between; one ranking of all channels of the network without
normalisation. Gates are read where channels are consumed, which at 1 is the gradient of a gate after batch norm.
Simplified: one short epoch instead of 25 (counted and shown), so that more channels go at once and more often; as many
at each removal as an even reduction of the MACs asks for; the study's floors. Published: ResNet-50 on ImageNet 76.18 to
74.50 % at 2.25 G MACs.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.config import Positive, Share
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.methods._gated import loss_under
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import TrainingOptions, batches
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate


class Options(TrainingOptions):
    """Options of the training; params.yaml says what each is for."""

    every: Positive = 4
    smoothing: Share = 0.9


def plan(context: Context, options: Options) -> PruningPlan:
    network, gates = copy.deepcopy(context.network), Gates(context.groups)
    descent, data = SGD(network, options, {}), batches(context.train, options.batch_size, context.generator)
    mask = torch.ones(gates.total, device=next(network.parameters()).device)
    scores, removals = torch.zeros_like(mask), max(1, options.steps // options.every)
    for step in bar(range(options.steps), context.method):
        found = minibatch(network, gates, mask, next(data))
        scores = found if step == 0 else options.smoothing * scores + (1 - options.smoothing) * found
        descent.step(learning_rate(options, step, options.steps))
        done = (step + 1) // options.every
        if (step + 1) % options.every == 0 and done < removals:
            close(mask, ranked(gates, mask, scores), gates, context.space, done / removals)
    network.eval()
    ranking = ranked(gates, mask, scores)
    return context.keep_best(ranking, threshold_widths(context.space, ranking),
                             "squared gradient of gates, removed while training, one threshold", trained=network,
                             images=options.steps * options.batch_size)


def minibatch(network: nn.Module, gates: Gates, mask: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Backward pass of a batch's mean loss under the mask; squared gradients of all gates [channels]."""
    value = mask.clone().requires_grad_()
    network.train()
    with wide_batchnorm(network):
        loss_under(network, gates, value, batch).backward()
    return value.grad.square()


def close(mask: Tensor, ranking: list[Tensor], gates: Gates, space: Space, share: float) -> None:
    """Closes the gates that rank lowest in place, until so much of the way to the budget is gone."""
    on_the_way = replace(space, budget=1 - (1 - space.budget) * share, tolerance=1.0)  # no exact budget is needed yet
    widths = threshold_widths(on_the_way, ranking)
    for part, score, width in zip(gates.split(mask), ranking, widths):
        part[torch.argsort(score, stable=True)[:len(part) - int(width)]] = 0


def ranked(gates: Gates, mask: Tensor, scores: Tensor) -> list[Tensor]:
    """Scores per group [channels]; what is closed comes last."""
    return gates.split(torch.where(mask > 0, scores, -1.0).double().cpu())

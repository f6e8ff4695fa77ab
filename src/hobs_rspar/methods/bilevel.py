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
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.config import Fraction, Positive, Section
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.methods._gated import Macs, batches, loss_under, planned, sampled
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate

TEMPERATURE, OPEN = 0.4, 3.0  # of the Gumbel-sigmoid, and the first logits: gates begin open


class Options(Section):
    """Options of the training; params.yaml says what each is for."""

    images: Positive = 10_000
    batch_size: Positive = 128
    learning_rate: Annotated[float, Field(gt=0)] = 0.01
    gate_rate: Annotated[float, Field(gt=0)] = 0.1
    strength: Annotated[float, Field(ge=0)] = 4.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup: Fraction = 0.2


def plan(context: Context, options: Options) -> PruningPlan:
    network = copy.deepcopy(context.network)
    logits, images = trained(network, context, options)
    return planned(context, logits, network, images, "gates learnt on held-out images, weights under them (stand-in)")


def trained(network: nn.Module, context: Context, options: Options) -> tuple[Tensor, int]:
    """Upper and lower steps in turns; logits of the gates [channels] and the images seen by both."""
    device, random = next(network.parameters()).device, context.generator
    gates, macs = Gates(context.groups), Macs(context.groups, device)
    logits = torch.full((gates.total,), OPEN, device=device, requires_grad=True)
    descent, adam = SGD(network, options, {}), torch.optim.Adam([logits], lr=options.gate_rate)
    steps = max(1, options.images // options.batch_size)
    upper, lower = (batches(images, options.batch_size, random) for images in (context.calibration, context.train))
    for step in bar(range(steps), "bilevel"):
        network.eval()
        value = macs.opened(sampled(logits, TEMPERATURE, random))
        loss = loss_under(network, gates, value, next(upper)) + options.strength * macs.overshoot(value, context.budget)
        adam.zero_grad()
        loss.backward()
        adam.step()
        network.zero_grad()
        network.train()
        with wide_batchnorm(network):
            loss_under(network, gates, value.detach(), next(lower)).backward()
        descent.step(learning_rate(options, step, steps))
    network.eval()
    return logits.detach(), 2 * steps * options.batch_size

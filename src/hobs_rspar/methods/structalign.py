"""StructAlign (SANP): a network that emits gates, and weights that are gradually aligned with them.

Paper: Gao et al., Structural Alignment for Network Pruning through Partial Regularization, ICCV 2023. Faithful: gates
from a GRU and a dense layer per group by Gumbel-sigmoid with the straight-through gradient, on what consumers read
after the activation; they minimise loss + lambda log(max(MACs, budget) / budget), lambda = 4, by Adam; the weights
minimise the loss of the whole network, and after every step the filters of closed gates shrink by a proximal step of
the group lasso, weighted by the share of its layer that is closed; gates begin after a fifth of the training.
Simplified: a short training (counted and shown) with larger steps and a stronger lasso to make up for it, gates
trained on as many images as the weights; the prox per channel (the paper's equation 8 prints the layer's norm; its
equation 5 does not). The source documents' KL term is nowhere in the paper. Published: ResNet-56 on CIFAR-10 93.49 to
93.81 % at 52 % fewer FLOPs, ResNet-50 on ImageNet 76.06 to 76.47 % at 56 % fewer.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hobs_rspar.config import Share
from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import places_of, weights
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.methods._gated import OPEN, Macs, loss_under, planned, sampled
from hobs_rspar.methods._gated import Options as GatedOptions
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import Above, NonNegative, batches, training_loss
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate

EMBEDDING, HIDDEN = 64, 128  # of the gate network


class Options(GatedOptions):
    """Options of the training; params.yaml says what each is for."""

    learning_rate: Above = 0.018
    gate_rate: Above = 0.0085
    strength: NonNegative = 4.0
    lasso: NonNegative = 0.2
    begin: Share = 0.2


class GateNetwork(nn.Module):
    """Logits of all gates: a GRU goes over the groups, a dense layer for each emits its channels' (SANP's AGN).

    Args:
        sizes: channels of every group.
        seed: of its weights and of the fixed inputs.
    """

    def __init__(self, sizes: list[int], seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.register_buffer("inputs", torch.randn(len(sizes), 1, EMBEDDING))
            self.recurrent = nn.GRU(EMBEDDING, HIDDEN)
            self.dense = nn.ModuleList(nn.Linear(HIDDEN, size) for size in sizes)

    def forward(self) -> Tensor:
        states = self.recurrent(self.inputs)[0][:, 0]
        return torch.cat([layer(state) for layer, state in zip(self.dense, states)]) + OPEN


def plan(context: Context, options: Options) -> PruningPlan:
    network = copy.deepcopy(context.network)
    logits, images = trained(network, context, options)
    return planned(context, logits, network, images, "learnt gates, weights aligned by partial group lasso")


def trained(network: nn.Module, context: Context, options: Options) -> tuple[Tensor, int]:
    """Trains gates and weights in turns; logits of the gates [channels] and the images seen by both."""
    device, random, groups = next(network.parameters()).device, context.generator, context.groups
    gates, macs = Gates(groups), Macs(groups, device)
    source = GateNetwork(groups.sizes.tolist(), context.derived_seed).to(device)
    descent, adam = SGD(network, options, {}), torch.optim.Adam(source.parameters(), lr=options.gate_rate)
    begin = round(options.begin * options.steps)
    data = batches(context.train, options.batch_size, random)
    for step in bar(range(options.steps), "structalign"):
        if step >= begin:
            network.eval()
            value = macs.opened(sampled(source(), random))
            loss = loss_under(network, gates, value, next(data))
            adam.zero_grad()
            (loss + options.strength * macs.overshoot(value, context.space.budget)).backward()
            adam.step()
            network.zero_grad()
        training_loss(network, next(data)).backward()
        rate = learning_rate(options, step, options.steps)
        descent.step(rate)
        if step >= begin:
            shrink(network, groups, value.detach(), rate * options.lasso)
    network.eval()
    return source().detach(), (2 * options.steps - begin) * options.batch_size


@torch.no_grad()
def shrink(network: nn.Module, groups: Groups, gates: Tensor, amount: float) -> None:
    """Proximal step of the group lasso on the filters of closed gates.

    Their norms become smaller by ``amount`` times the share of the group that is closed, at least 0.
    """
    for group, value in zip(groups, gates.cpu().split(groups.sizes.tolist())):
        closed = (value == 0).nonzero()[:, 0].tolist()
        for member in group.with_role("producer", "depthwise") if closed else ():
            for weight, axis, places in weights(network, member):
                rows, filters = places_of(places, closed, weight.device), weight.movedim(axis, 0)  # a view
                norms = filters[rows].flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (weight.dim() - 1))
                filters[rows] *= (1 - amount * len(closed) / group.channels / norms).clamp_min(0)

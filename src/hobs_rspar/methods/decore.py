"""DECORE: every channel is an agent that drops itself or not, and is paid for what its group dropped and got right.

Paper: Alwani et al., DECORE: Deep Compression with Reinforcement Learning, CVPR 2022 (no code; read through abstract
and tables). Faithful: a weight w for every channel, which stays with probability sigmoid(w); REINFORCE with the reward
(dropped channels of its group) x (1 where the image is classified correctly, else -lambda); every image of a batch has
an episode of its own; likely channels stay. Simplified or assumed: the network's weights are trained under the sampled
gates in turn with the agents, in one short epoch (counted and shown), with larger steps to make up for it; the mean
reward of the batch is taken off as a baseline, and rewards are divided by the group's size; lambda decides the paper's
compression, here the widths are projected on the budget. Published: ResNet-56 on CIFAR-10 93.26 % at 49.9 % fewer MACs,
ResNet-50 on ImageNet 74.58 % at 2.36 G MACs.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.device import autocast
from hobs_rspar.methods import _gated
from hobs_rspar.methods._gated import Options as GatedOptions
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import Above, NonNegative, batches
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate


class Options(GatedOptions):
    """Options of the training; params.yaml says what each is for."""

    learning_rate: Above = 0.0051
    gate_rate: Above = 0.062
    penalty: NonNegative = 300.0


def plan(context: Context, options: Options) -> PruningPlan:
    network, groups = copy.deepcopy(context.network), context.groups
    device = next(network.parameters()).device
    logits = torch.full((int(groups.sizes.sum()),), _gated.OPEN, device=device, requires_grad=True)
    gates, macs = Gates(groups), _gated.Macs(groups, device)
    descent, adam = SGD(network, options, {}), torch.optim.Adam([logits], lr=options.gate_rate)
    data = batches(context.train, options.batch_size, context.generator)
    for step in bar(range(options.steps), context.method):
        batch = next(data)
        kept = torch.bernoulli(torch.sigmoid(logits.detach().cpu()).expand(len(batch[1]), -1),
                               generator=context.generator).to(device)
        right = correct(network, gates, macs.opened(kept), batch)
        adam.zero_grad()
        policy_loss(logits, kept, right, groups.sizes.tolist(), options.penalty).backward()
        adam.step()
        network.train()
        with wide_batchnorm(network):
            _gated.loss_under(network, gates, macs.opened(kept[0]), next(data)).backward()
        descent.step(learning_rate(options, step, options.steps))
    network.eval()
    return _gated.planned(context, logits, network, 2 * options.steps * options.batch_size,
                          "channels that stay likely (REINFORCE)")


@torch.no_grad()
def correct(network: nn.Module, gates: Gates, kept: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Whether each image is classified correctly under its own gates [n, channels]: [n]."""
    x, labels = batch
    network.eval()
    with gates.applied(network, kept), autocast(x.device):
        return network(x).argmax(1) == labels


def policy_loss(logits: Tensor, kept: Tensor, right: Tensor, sizes: list[int], penalty: float) -> Tensor:
    """REINFORCE: minus (reward - its mean over the batch) x log-probability, summed over groups, mean over images.

    Args:
        logits: of the channels staying [channels].
        kept: what was drawn [n, channels].
        right: whether the image was classified correctly [n].
        sizes: channels of every group.
        penalty: lambda, taken where it was not.
    """
    density = -nn.functional.binary_cross_entropy_with_logits(logits.expand_as(kept), kept, reduction="none")
    paid = torch.where(right, 1.0, -penalty)
    total = logits.new_zeros(())
    for gate, log in zip(kept.split(sizes, 1), density.split(sizes, 1)):
        reward = (1 - gate).sum(1) * paid
        share = (reward - reward.mean()) / gate.shape[1]  # so that no group is heard more for its size
        total = total - (share * log.sum(1)).mean()
    return total

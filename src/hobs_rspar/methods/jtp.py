"""JTP (RLAL): an agent chooses kept ratios while the weights are trained towards its best choice, in turns.

Paper: Ganjdanesh et al., Jointly Training and Pruning CNNs via Learnable Agent Guidance and Alignment, CVPR 2024.
Faithful: rounds of training, then of episodes with the weights frozen; soft actor-critic with two critics, entropy 0.1
and networks of 300 units, whose state holds an embedding of the round from a GRU that a decoder of the reward trains;
the reward, the same for all steps of an episode, is the pruned accuracy on held-out training images (calibration); the
channels with the smallest norms go; the weights minimise loss + beta times the norm of each layer's part that the best
choice removes. Simplified: one short training (counted and shown) with a stronger beta to make up for it, groups of
coupled channels instead of layers, the budget met by projection instead of by clipping each action. Published:
ResNet-56 on CIFAR-10 93.41 to 93.86 % at 50 % fewer FLOPs, MobileNetV2 on ImageNet 71.82 to 71.32 % at 29 % fewer.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.allocation.sac import SoftActorCritic, perceptron
from hobs_rspar.allocation.walk import Walk, features
from hobs_rspar.config import Positive
from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms, places_of, weights
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import NonNegative, TrainingOptions, batches, training_loss
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, accuracy, learning_rate, logits

EMBEDDING, DECODER_RATE = 128, 1e-3  # of the round, and of what decodes the reward from it


class Options(TrainingOptions):
    """Options of training and agent; params.yaml says what each is for."""

    rounds: Positive = 6
    episodes: Positive = 8
    updates: Positive = 64
    held_out: Positive = 512
    hidden: Positive = 300
    entropy: NonNegative = 0.1
    alignment: NonNegative = 0.01


class Guide:
    """The agent, and the rounds' embeddings that its states carry.

    Args:
        context: of the method.
        options: of the agent.
    """

    def __init__(self, context: Context, options: Options):
        self.context, self.options = context, options
        self.walk = Walk(features(context.space, np.ones(len(context.groups))))
        inputs = self.walk.state_dim + EMBEDDING
        self.agent = SoftActorCritic(inputs, options.hidden, options.entropy, context.derived_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.derived_seed)
            self.embeddings = nn.Embedding(options.rounds, EMBEDDING)
            self.recurrent, self.decoder = nn.GRU(EMBEDDING, EMBEDDING), perceptron(inputs + 1, 1, options.hidden)
        parts = [*self.embeddings.parameters(), *self.recurrent.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parts, lr=DECODER_RATE)
        self.evaluations = 0

    def play(self, network: nn.Module, number: int) -> Tensor:
        """Episodes on frozen weights, then updates; gates [channels] of the choice with the highest reward."""
        state = self.recurrent(self.embeddings.weight[:number + 1, None])[0][-1]
        chosen: list[Tensor] = []
        seen: list[Tensor] = []

        def select(states: Tensor) -> Tensor:
            seen.append(torch.cat([states, state.detach().expand(len(states), -1)], 1))
            chosen.append(self.agent.act(seen[-1]))
            return chosen[-1]

        ratios, _ = self.walk.run(select, self.options.episodes)
        options = self.masks(network, self.context.space.project(ratios.double().numpy()))
        paid = torch.tensor([self.reward(network, mask) for mask in options])
        self.agent.remember(torch.stack(seen), torch.stack(chosen), paid.expand(len(seen), -1))
        for _ in range(self.options.updates):
            self.agent.learn()
        self._decode(state, torch.stack(seen), torch.stack(chosen), paid)
        return options[int(paid.argmax())]

    def masks(self, network: nn.Module, widths: np.ndarray) -> Tensor:
        """Gates [n, channels] that keep the filters with the largest norms at widths [n, groups]."""
        ranks = [(-norm).argsort(stable=True).argsort() for norm in filter_norms(network, self.context.groups, 2)]
        return torch.stack([torch.cat([(rank < int(width)).float() for rank, width in zip(ranks, row)])
                            for row in widths])

    def reward(self, network: nn.Module, mask: Tensor) -> float:
        """Accuracy (a fraction) of the masked network on held-out training images."""
        images = self.context.calibration.first(self.options.held_out)
        self.evaluations += 1
        with Gates(self.context.groups).applied(network, mask[None].to(images.pixels.device)):
            return accuracy(logits(network, images, "auto"), images.labels) / 100

    def _decode(self, state: Tensor, seen: Tensor, chosen: Tensor, paid: Tensor) -> None:
        """One step of the embeddings: the reward must be readable from them, the states and the actions."""
        own = seen[..., :-EMBEDDING]
        inputs = torch.cat([own, state.expand(*own.shape[:2], -1), chosen[..., None]], 2)
        self.optimizer.zero_grad()
        F.mse_loss(self.decoder(inputs)[..., 0], paid.expand(len(seen), -1)).backward()
        self.optimizer.step()


def plan(context: Context, options: Options) -> PruningPlan:
    network, guide = copy.deepcopy(context.network), Guide(context, options)
    descent = SGD(network, options, {})
    data = batches(context.train, options.batch_size, context.generator)
    ends = np.linspace(0, options.steps, options.rounds + 1).round().astype(int)
    best = torch.ones(int(context.groups.sizes.sum()))
    for number in bar(range(options.rounds), context.method):
        for step in range(ends[number], ends[number + 1]):
            pull = options.alignment * misaligned(network, context.groups, best)
            (training_loss(network, next(data)) + pull).backward()
            descent.step(learning_rate(options, step, options.steps))
        network.eval()
        best = guide.play(network, number)
    widths = np.array([int(part.sum()) for part in best.split(context.groups.sizes.tolist())])
    search = {"evaluations": guide.evaluations, "images": guide.evaluations * options.held_out, "episodes": [],
              "chosen": "highest reward of the last round", "measured": []}
    return context.keep_best(filter_norms(network, context.groups, 2), widths, "L2 norm, soft actor-critic",
                             search=search, trained=network, images=options.steps * options.batch_size)


def misaligned(network: nn.Module, groups: Groups, mask: Tensor) -> Tensor:
    """Sum over layers of the norm of the filters that the mask removes."""
    total = torch.zeros(())
    for group, kept in zip(groups, mask.split(groups.sizes.tolist())):
        closed = (kept == 0).nonzero()[:, 0].tolist()
        for member in group.with_role("producer", "depthwise") if closed else ():
            for weight, axis, places in weights(network, member):
                total = total + weight.index_select(axis, places_of(places, closed, weight.device)).norm().cpu()
    return total

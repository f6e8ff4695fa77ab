"""Soft actor-critic (Haarnoja et al. 2018) of the kept ratio of each group, with two critics and replay."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.allocation.trial import Trial
from hobs_rspar.allocation.walk import RewardedWalk

MINIBATCH = 128  # transitions a step
MEMORY = 20_000  # transitions
DISCOUNT = 0.99
FOLLOW = 0.01  # how fast the target critics follow
ACTOR_RATE, CRITIC_RATE = 1e-3, 3e-3
LOWEST, HIGHEST = -3.0, 1.0  # of the actor's log standard deviation
EPISODES, STEPS, HIDDEN, ENTROPY = 16, 16, 64, 0.02  # of the search by itself: a round's episodes and steps, the agent


def perceptron(inputs: int, outputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, outputs))


class SoftActorCritic:
    """Actor, two critics with targets, and replay memory. An action is a kept ratio, sigmoid(u) of a Gaussian u.

    Args:
        inputs: values of a state.
        hidden: width of all networks.
        entropy: weight of the entropy in the return.
        seed: of the weights and of all samples.
    """

    def __init__(self, inputs: int, hidden: int, entropy: float, seed: int):
        self.entropy, self.generator = entropy, torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = perceptron(inputs, 2, hidden)
            self.critics = nn.ModuleList(perceptron(inputs + 1, 1, hidden) for _ in range(2))
        self.targets = copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=ACTOR_RATE, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=CRITIC_RATE, fused=True)
        self.memory: tuple[Tensor, ...] = ()

    def sample(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Kept ratios [n] for states [n, inputs], and their log-densities [n], differentiable in the actor."""
        mean, log_std = self.actor(states).unbind(1)
        log_std = log_std.clamp(LOWEST, HIGHEST)
        noise = torch.randn(mean.shape, generator=self.generator)
        raw = mean + log_std.exp() * noise
        density = torch.distributions.Normal(mean, log_std.exp()).log_prob(raw)
        return torch.sigmoid(raw), density - F.logsigmoid(raw) - F.logsigmoid(-raw)

    @torch.no_grad()
    def act(self, states: Tensor) -> Tensor:
        """Kept ratios [n] for states [n, inputs]."""
        return self.sample(states)[0]

    def remember(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """Stores episodes: states [steps, n, inputs], actions [steps, n], rewards of every step [steps, n]."""
        following = torch.cat([states[1:], states[-1:]])
        last = torch.zeros(actions.shape).index_fill(0, torch.tensor([len(states) - 1]), 1.0)
        new = tuple(part.flatten(0, 1) for part in (states, actions, rewards, following, last))
        self.memory = tuple(torch.cat([old, part])[-MEMORY:] for old, part in zip(self.memory, new)) or new

    def learn(self) -> None:
        """One step of the critics, of the actor, and of the targets on a random minibatch."""
        index = torch.randint(len(self.memory[0]), (MINIBATCH,), generator=self.generator)
        states, actions, rewards, following, last = (part[index] for part in self.memory)
        with torch.no_grad():
            ahead, density = self.sample(following)
            wanted = rewards + DISCOUNT * (1 - last) * (self._values(self.targets, following, ahead).amin(0)
                                                        - self.entropy * density)
        self.critic_optimizer.zero_grad()
        F.mse_loss(self._values(self.critics, states, actions), wanted.expand(2, -1)).backward()
        self.critic_optimizer.step()
        chosen, density = self.sample(states)
        self.actor_optimizer.zero_grad()
        (self.entropy * density - self._values(self.critics, states, chosen).amin(0)).mean().backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            for target, critic in zip(self.targets.parameters(), self.critics.parameters()):
                target.lerp_(critic, FOLLOW)

    @staticmethod
    def _values(critics: nn.ModuleList, states: Tensor, actions: Tensor) -> Tensor:
        """What both critics expect [2, n]."""
        inputs = torch.cat([states, actions[:, None]], 1)
        return torch.stack([critic(inputs)[:, 0] for critic in critics])


def search(trial: Trial, generator: np.random.Generator) -> None:
    """The best allocation that the agent comes across while it learns; every step is paid with its episode's reward."""
    walk = RewardedWalk(trial)
    agent = SoftActorCritic(walk.state_dim, HIDDEN, ENTROPY, int(generator.integers(2**63)))
    while True:
        _round(walk, agent)


def _round(walk: RewardedWalk, agent: SoftActorCritic) -> None:
    """Some episodes, then some steps of learning."""
    chosen: list[Tensor] = []

    def select(states: Tensor) -> Tensor:
        chosen.append(agent.act(states))
        return chosen[-1]

    ratios, states = walk.run(select, EPISODES)
    agent.remember(states, torch.stack(chosen), walk.pay(ratios).expand(len(states), -1))
    for _ in range(STEPS):
        agent.learn()

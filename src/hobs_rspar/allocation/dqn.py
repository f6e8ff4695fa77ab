"""Deep Q-learning (Mnih et al. 2015) of the kept ratio of each group, with replay and a target network."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.allocation.trial import Trial
from hobs_rspar.allocation.walk import RewardedWalk, Walk

EPISODES, MINIBATCH = 16, 128  # episodes a round, each followed by a gradient step; transitions a step
HIDDEN, LEARNING_RATE = 64, 3e-3
LEVELS = 20  # kept ratios to choose from, evenly spaced up to 1
MEMORY = 20_000  # transitions
ROUNDS = 4  # between copies to the target network
LEAST = 0.05  # share of random actions at the end; all are random at the beginning


class Learner:
    """Q network, target network and replay memory.

    Args:
        inputs: values of a state.
        seed: of the weights and of all samples.
    """

    def __init__(self, inputs: int, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = nn.Sequential(nn.Linear(inputs, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                                         nn.Linear(HIDDEN, LEVELS))
        self.target = copy.deepcopy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=LEARNING_RATE, fused=True)
        self.memory: tuple[Tensor, ...] = ()
        self.rounds = 0

    @torch.no_grad()
    def act(self, states: Tensor, random: float) -> Tensor:
        """Levels [n] for states [n, inputs]: the best ones, or random ones with probability ``random``."""
        anything = torch.randint(LEVELS, (len(states),), generator=self.generator)
        explores = torch.rand(len(states), generator=self.generator) < random
        return torch.where(explores, anything, self.network(states).argmax(1))

    def remember(self, states: Tensor, actions: Tensor, rewards: Tensor) -> None:
        """Stores complete episodes: states [steps, n, inputs], actions [steps, n], rewards at their ends [n]."""
        following = torch.cat([states[1:], states[-1:]])
        last = torch.zeros(actions.shape).index_fill(0, torch.tensor([len(states) - 1]), 1.0)
        new = [part.flatten(0, 1) for part in (states, actions, last * rewards, following, last)]
        self.memory = tuple(torch.cat([old, part])[-MEMORY:] for old, part in zip(self.memory, new)) or tuple(new)

    def update(self, steps: int) -> None:
        """Gradient steps; after every few rounds of them the target network is the present one."""
        for _ in range(steps):
            self._learn()
        self.rounds += 1
        if self.rounds % ROUNDS == 0:
            self.target.load_state_dict(self.network.state_dict())

    def _learn(self) -> None:
        """One step on a random minibatch, towards the reward plus the target network's value of the next state."""
        index = torch.randint(len(self.memory[0]), (MINIBATCH,), generator=self.generator)
        states, actions, rewards, following, last = (part[index] for part in self.memory)
        with torch.no_grad():
            wanted = rewards + (1 - last) * self.target(following).amax(1)
        found = self.network(states).gather(1, actions[:, None])[:, 0]
        self.optimizer.zero_grad()
        F.smooth_l1_loss(found, wanted).backward()
        self.optimizer.step()


def search(trial: Trial, generator: np.random.Generator) -> None:
    """The best allocation that the agent comes across while it learns."""
    walk = RewardedWalk(trial)
    learner = Learner(walk.state_dim, int(generator.integers(2**63)))
    while True:
        practise(learner, walk, walk.pay, EPISODES, exploration(trial.progress))


def exploration(progress: float) -> float:
    """Share of random actions: all at the beginning, few from half of the search on."""
    return max(LEAST, 1 - 2 * progress)


def practise(learner: Learner, walk: Walk, pay: Callable[[Tensor], Tensor], episodes: int, random: float) -> None:
    """Some parallel episodes, paid after the last group, then as many steps of learning.

    Args:
        learner: learns.
        walk: makes the episodes.
        pay: rewards [episodes] of ratios [episodes, groups].
        episodes: in parallel.
        random: share of random actions.
    """
    chosen: list[Tensor] = []

    def select(states: Tensor) -> Tensor:
        chosen.append(learner.act(states, random))
        return (chosen[-1] + 1) / LEVELS

    ratios, states = walk.run(select, episodes)
    learner.remember(states, torch.stack(chosen), pay(ratios))
    learner.update(episodes)

"""R-SPAR: an agent (PPO, or DQN) walks through the groups, chooses a kept ratio for each, and is paid for accuracy.

State: features of the group, ratios so far, accuracy drop of the last episodes. Action: kept ratio. After the last
group the ratios are projected so that the budget is met:

    reward = -(accuracy dense - accuracy pruned) - lambda(t) max(0, MACs(raw action) / budget - 1)

The penalty is that of the raw action; after projection it would always be 0. The accuracy is the one that the measured
allocations foretell (allocation/measured_search.py): the agent lives through thousands of episodes on it, and the plans
that it likes best are really run.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.allocation import dqn
from hobs_rspar.allocation.measured_search import Model
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.walk import Walk, practise

REWARD_SCALE = 100.0  # rewards are fractions of accuracy; the critic learns faster in points
MINIBATCH = 256  # steps


class Player:
    """Some agent and what it has lived through in this round; a proposer of measured_search.

    Args:
        space: allocations that meet the budget.
        about: features of the groups [groups, features].
        options: the block of ``methods.hobs_rspar``.

    Attributes:
        records: one per update of the agent, the means over its episodes.
    """

    def __init__(self, space: Space, about: np.ndarray, options):
        self.space, self.options, self.walk, self.records = space, options, Walk(about), []
        self.penalty = AdaptivePenalty(options.penalty, options.penalty_rate, options.penalty_sign,
                                       options.penalty_min, options.penalty_max)

    def propose(self, model: Model, known: np.ndarray, count: int) -> np.ndarray:
        """Updates of the agent on the model; the round's new allocations of least expected drop [n, groups]."""
        self.visited, self.expected = [], []
        for _ in range(self.options.iterations):
            self._practise(lambda ratios: self._pay(ratios, model))
        widths, first = np.unique(np.concatenate(self.visited), axis=0, return_index=True)
        fresh = self.space.meets(widths) & ~(widths[:, None] == known[None]).all(2).any(1)
        expected = np.concatenate(self.expected)[first]
        return widths[fresh][np.argsort(expected[fresh], kind="stable")[:count]]

    def _practise(self, pay: Callable[[Tensor], Tensor]) -> None:
        """Some episodes, paid by their ratios, and one update of the agent."""
        raise NotImplementedError

    def _pay(self, raw: Tensor, model: Model) -> Tensor:
        """Rewards [episodes] of the agent's ratios [episodes, groups]."""
        ratios, groups, space = raw.double().numpy(), self.space.groups, self.space
        widths, excess = space.project(ratios), space.overshoot(ratios)
        drops = model.drop(widths)
        weights = self.penalty.weight(model.dense, model.dense - drops)
        rewards = -drops - weights * excess
        self.visited.append(widths)
        self.expected.append(drops)
        self.walk.behind = float(drops.mean())
        means = {"reward": rewards, "accuracy_drop": drops, "penalty": excess, "lambda": weights,
                 "raw_macs_ratio": groups.macs(space.rounded(ratios)) / groups.dense_macs,
                 "macs_ratio": groups.macs(widths) / groups.dense_macs}
        self.records.append({"episode": (len(self.records) + 1) * len(ratios),
                             **{name: float(np.mean(values)) for name, values in means.items()},
                             "ratios": (widths / space.sizes).mean(0).round(4).tolist()})
        return torch.tensor(REWARD_SCALE * rewards, dtype=torch.float32)


class PPOPlayer(Player):
    """R-SPAR's own agent; arguments as :class:`Player`, and the agent's seed."""

    def __init__(self, space: Space, about: np.ndarray, options, seed: int):
        super().__init__(space, about, options)
        self.agent = RSPARAgent(len(about), about.shape[1], options.hidden, options.learning_rate, options.gamma,
                                gae_lambda=options.gae_lambda, clip=options.clip, entropy=options.entropy,
                                initial_ratio=float((space.uniform / space.sizes).mean()), seed=seed)

    def _practise(self, pay: Callable[[Tensor], Tensor]) -> None:
        practise(self.agent, self.walk, pay, self.options.episodes, MINIBATCH, self.options.epochs)


class DQNPlayer(Player):
    """Deep Q-learning in PPO's place: the same states, rewards and number of episodes; arguments as PPO's."""

    def __init__(self, space: Space, about: np.ndarray, options, seed: int):
        super().__init__(space, about, options)
        self.learner = dqn.Learner(self.walk.state_dim, seed)

    def _practise(self, pay: Callable[[Tensor], Tensor]) -> None:
        done = len(self.records) / (self.options.iterations * self.options.rounds)
        dqn.practise(self.learner, self.walk, pay, self.options.episodes, dqn.exploration(done))

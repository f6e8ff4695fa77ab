"""R-SPAR: a PPO agent walks through the groups, chooses a kept ratio for each, and is paid for accuracy.

State: features of the group, ratios so far, accuracy drop of the last episodes. Action: kept ratio. After the last
group the ratios are projected so that the budget is met:

    reward = -(accuracy dense - accuracy pruned) - lambda(t) max(0, MACs(raw action) / budget - 1)

The penalty is that of the raw action; after projection it would always be 0. The accuracy is the one that the measured
allocations foretell (allocation/measured_search.py): the agent lives through thousands of episodes on it, and the plans
that it likes best are really run.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.allocation.measured_search import Model
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.walk import Walk, practise

REWARD_SCALE = 100.0  # rewards are fractions of accuracy; the critic learns faster in points
MINIBATCH = 256  # steps


class Player:
    """The agent and what it has lived through in this round; a proposer of measured_search.

    Args:
        space: allocations that meet the budget.
        about: features of the groups [groups, features].
        options: the block of ``methods.hobs_rspar``.
        seed: of the agent.

    Attributes:
        records: one per policy update, the means over its episodes.
    """

    def __init__(self, space: Space, about: np.ndarray, options, seed: int):
        self.space, self.options, self.walk, self.records = space, options, Walk(about), []
        self.agent = RSPARAgent(len(about), about.shape[1], options.hidden, options.learning_rate, options.gamma,
                                gae_lambda=options.gae_lambda, clip=options.clip, entropy=options.entropy,
                                initial_ratio=float((space.uniform / space.sizes).mean()), seed=seed)
        self.penalty = AdaptivePenalty(options.penalty, options.penalty_rate, options.penalty_sign,
                                       options.penalty_min, options.penalty_max)

    def propose(self, model: Model, known: np.ndarray, count: int) -> np.ndarray:
        """Policy updates on the model; the new allocations of this round with the least expected drop [n, groups]."""
        self.visited, self.expected = [], []
        for _ in range(self.options.iterations):
            practise(self.agent, self.walk, lambda ratios: self._pay(ratios, model), self.options.episodes, MINIBATCH,
                     self.options.epochs)
        widths, first = np.unique(np.concatenate(self.visited), axis=0, return_index=True)
        fresh = ~(widths[:, None] == known[None]).all(2).any(1)
        expected = np.concatenate(self.expected)[first]
        return widths[fresh][np.argsort(expected[fresh], kind="stable")[:count]]

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

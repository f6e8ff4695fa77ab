"""R-SPAR's decision process: one group after the other, each step chooses a kept ratio, the reward comes at the end.

The same for every agent. State: features of the group, ratios chosen so far (0 for later groups), and how far the last
episodes stayed behind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Trial


class Walk:
    """Parallel episodes.

    Args:
        features: of the groups [groups, features].

    Attributes:
        behind: last entry of the state; the agent's loop sets it.
        state_dim: values of a state.
    """

    def __init__(self, features: np.ndarray):
        self.features = torch.tensor(features, dtype=torch.float32)
        self.behind, self.state_dim = 0.0, self.features.shape[1] + len(self.features) + 1

    def run(self, select: Callable[[Tensor], Tensor], episodes: int) -> tuple[Tensor, Tensor]:
        """Walks through all groups.

        Args:
            select: kept ratios [episodes] for states [episodes, state_dim].
            episodes: in parallel.

        Returns:
            Ratios [episodes, groups] and the states that were visited [groups, episodes, state_dim].
        """
        ratios, states = torch.zeros(episodes, len(self.features)), []
        behind = torch.full((episodes, 1), self.behind)
        for step, feature in enumerate(self.features):
            states.append(torch.cat([feature.expand(episodes, -1), ratios, behind], 1))
            ratios[:, step] = select(states[-1])
        return ratios, torch.stack(states)


def practise(agent: RSPARAgent, walk: Walk, pay: Callable[[Tensor], Tensor], episodes: int, minibatch: int,
             epochs: int) -> None:
    """Some parallel episodes, paid after the last group, and one update of the policy.

    Args:
        agent: learns.
        walk: makes the episodes.
        pay: rewards [episodes] of ratios [episodes, groups].
        episodes: in parallel.
        minibatch: steps.
        epochs: passes over the episodes.
    """
    ratios, states = walk.run(lambda states: agent.select_action(states)[0], episodes)
    paid = pay(ratios)
    for step in range(len(states)):
        agent.observe(paid if step == len(states) - 1 else torch.zeros(episodes))
    agent.update_policy(minibatch, epochs)


def features(space: Space, error: np.ndarray) -> np.ndarray:
    """Per group: position, share of channels, share of the expense saved by halving it, of error at half its width.

    Args:
        space: of the search.
        error: what halving each group costs [groups].

    Returns:
        [groups, 4], each column at most 1.
    """
    saved = 1 - space.spent(halves(space.sizes))
    columns = [np.arange(len(error)) / len(error), space.sizes / space.sizes.max(), saved / max(saved.max(), 1e-12),
               error / max(error.max(), 1e-12)]
    return np.stack(columns, 1)


def halves(sizes: np.ndarray) -> np.ndarray:
    """The dense network with one group halved [groups, groups]."""
    return sizes - np.diag(sizes // 2)


class RewardedWalk(Walk):
    """The walk of a trial: episodes end in projected widths, and pay what these gain over uniform widths.

    Rewards of any scale become comparable: 1 is what uniform widths lose of the dense network's reward.
    """

    def __init__(self, trial: Trial):
        dense = float(trial.score(trial.space.sizes[None])[0])
        error = dense - trial.score(halves(trial.space.sizes))
        super().__init__(features(trial.space, error))
        self.trial, self.scale = trial, max(dense - trial.score_of_uniform, 1e-12)

    def pay(self, ratios: Tensor) -> Tensor:
        """Rewards of complete episodes [episodes]; notes how far they stay behind uniform widths on average."""
        scores = self.trial.score(self.trial.space.project(ratios.double().numpy()))
        gains = torch.tensor((scores - self.trial.score_of_uniform) / self.scale, dtype=torch.float32)
        self.behind = -float(gains.mean())
        return gains

"""PPO as an allocator: R-SPAR's agent on any reward, in parallel episodes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Result, Reward, Trial
from hobs_rspar.allocation.walk import RewardedWalk, Walk

EPISODES, EPOCHS, MINIBATCH = 16, 8, 256
HIDDEN, LEARNING_RATE, ENTROPY = 64, 1e-2, 0.0
SCALE = 10.0  # of the reward: the critic learns faster when returns are not small


def allocate(reward: Reward, space: Space, evaluations: int, generator: np.random.Generator,
             seconds: float = math.inf) -> Result:
    """The best allocation that the policy comes across while it learns.

    Args:
        reward: scores allocations.
        space: to choose from.
        evaluations: different allocations that may be sent to the reward.
        generator: of the agent's seed.
        seconds: wall time that may pass.
    """
    with Trial(reward, space, evaluations, seconds) as trial:
        walk = RewardedWalk(trial)
        agent = new_agent(space, walk, int(generator.integers(2**63)))
        while True:
            learn(agent, walk, walk.pay)
    return trial.result()


def new_agent(space: Space, walk: Walk, seed: int) -> RSPARAgent:
    """An untrained agent, centred on uniform widths."""
    return RSPARAgent(len(space.sizes), walk.features.shape[1], HIDDEN, LEARNING_RATE, gamma=1.0, entropy=ENTROPY,
                      initial_ratio=float((space.uniform / space.sizes).mean()), seed=seed)


def learn(agent: RSPARAgent, walk: Walk, pay: Callable[[Tensor], Tensor]) -> None:
    """Some parallel episodes, paid after the last group, and one update of the policy.

    Args:
        agent: learns.
        walk: makes the episodes.
        pay: rewards [episodes] of ratios [episodes, groups], of the order of 1.
    """
    ratios, states = walk.run(lambda states: agent.select_action(states)[0], EPISODES)
    paid = SCALE * pay(ratios)
    for step in range(len(states)):
        agent.observe(paid if step == len(states) - 1 else torch.zeros(EPISODES))
    agent.update_policy(MINIBATCH, EPOCHS)

"""PPO as an allocator: R-SPAR's agent on any reward, in parallel episodes."""

from __future__ import annotations

import numpy as np

from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Trial
from hobs_rspar.allocation.walk import RewardedWalk, Walk, practise

EPISODES, EPOCHS, MINIBATCH = 16, 8, 256
HIDDEN, LEARNING_RATE, ENTROPY = 64, 1e-2, 0.0
SCALE = 10.0  # of the reward: the critic learns faster when returns are not small


def search(trial: Trial, generator: np.random.Generator) -> None:
    """The best allocation that the policy comes across while it learns."""
    walk = RewardedWalk(trial)
    agent = new_agent(trial.space, walk, int(generator.integers(2**63)))
    while True:
        practise(agent, walk, lambda ratios: SCALE * walk.pay(ratios), EPISODES, MINIBATCH, EPOCHS)


def new_agent(space: Space, walk: Walk, seed: int) -> RSPARAgent:
    """An untrained agent, centred on uniform widths."""
    return RSPARAgent(len(space.sizes), walk.features.shape[1], HIDDEN, LEARNING_RATE, gamma=1.0, entropy=ENTROPY,
                      initial_ratio=float((space.uniform / space.sizes).mean()), seed=seed)

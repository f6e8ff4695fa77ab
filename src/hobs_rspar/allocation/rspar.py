"""R-SPAR: a PPO agent walks through the groups, chooses a kept ratio for each, and is paid for accuracy.

State: features of the group, ratios so far, accuracy drop of the last episodes. Action: kept ratio. After the last
group the ratios are projected so that the budget is met:

    reward = -(accuracy dense - accuracy pruned) - lambda(t) max(0, MACs(raw action) / budget - 1)

The penalty is that of the raw action; after projection it would always be 0. Running every plan on validation images
would afford some hundred episodes. So rounds alternate: a few plans are pruned, repaired and run; a reward by look-up
is fitted to them (allocation/fitted.py); the agent lives through thousands of episodes on it; the plans that it likes
best are run next. What is chosen in the end was run, never only predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.fitted import FittedReward
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.walk import Walk, features
from hobs_rspar.data import Images
from hobs_rspar.progress import bar

REWARD_SCALE = 100.0  # rewards are fractions of accuracy; the critic learns faster in points
SPREAD = 0.2  # standard deviation of the log ratios of the first plans that are run
MINIBATCH = 256  # steps
FINALISTS = 3


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        widths: of the chosen allocation [groups].
        episodes: one record per policy update, the means over its episodes.
        measured: one record per allocation that was run on validation images, in order, and after how many updates.
        chosen: how the allocation was chosen, in words.
    """

    widths: np.ndarray
    episodes: list[dict]
    measured: list[dict]
    chosen: str


class Model:
    """What the measured allocations foretell about the others.

    Args:
        environment: has measured some.
        curves: see :func:`hobs_rspar.allocation.fitted.FittedReward`.
        widths: the measured allocations [n, groups].
    """

    def __init__(self, environment: PruningEnvironment, curves: Sequence[np.ndarray], widths: np.ndarray):
        seen = [environment.evaluate(row) for row in widths]
        drops = environment.dense.accuracy - np.array([found.accuracy for found in seen])
        self.reward = FittedReward(curves, widths, np.array([found.loss for found in seen]))
        score = self.reward.score(widths)
        away = score - score.mean()
        self.slope = min(0.0, away @ drops / max(away @ away, 1e-12))
        self.offset = drops.mean() - self.slope * score.mean()

    def drop(self, widths: np.ndarray) -> np.ndarray:
        """Expected accuracy drop, a fraction [n], of widths [n, groups]; linear in the predicted log loss."""
        return self.offset + self.slope * self.reward.score(widths)


def search(environment: PruningEnvironment, curves: Sequence[np.ndarray], space: Space, options, seed: int,
           finalists: Images) -> Search:
    """Runs the search.

    Args:
        environment: measures allocations.
        curves: predicted loss and relative error of every width, see :func:`hobs_rspar.allocation.fitted.FittedReward`.
        space: allocations that meet the budget.
        options: the block of ``methods.hobs_rspar``.
        seed: of the agent and of the first allocations.
        finalists: validation images on which the best allocations are compared once more.
    """
    generator = np.random.default_rng(seed)
    noise = generator.normal(0, SPREAD, (options.first - 1, len(space.sizes)))
    widths = np.unique(np.concatenate([space.uniform[None], space.project(np.exp(noise))]), axis=0)
    widths = np.concatenate([space.uniform[None], widths[(widths != space.uniform).any(1)]])
    error = np.array([curve[size - size // 2, 0] for curve, size in zip(curves, space.sizes)])
    player, updates = Player(space, features(space, error), options, seed), [0] * len(widths)
    for _ in bar(range(options.rounds), "R-SPAR"):
        player.learn(Model(environment, curves, widths), environment.dense.accuracy)
        widths = np.concatenate([widths, player.favourites(widths, options.measured)])
        updates += [len(player.records)] * (len(widths) - len(updates))
    chosen = f"lowest loss on {len(finalists)} validation images among the {FINALISTS} best measured allocations and " \
             "uniform widths"
    return Search(_choose(environment, widths, finalists), player.records,
                  _measured(environment, space, widths, updates), chosen)


class Player:
    """The agent and what it has lived through in this round.

    Attributes:
        records: one per policy update.
    """

    def __init__(self, space: Space, about: np.ndarray, options, seed: int):
        self.space, self.options, self.walk, self.records = space, options, Walk(about), []
        self.agent = RSPARAgent(len(about), about.shape[1], options.hidden, options.learning_rate, options.gamma,
                                gae_lambda=options.gae_lambda, clip=options.clip, entropy=options.entropy,
                                initial_ratio=float((space.uniform / space.sizes).mean()), seed=seed)
        self.penalty = AdaptivePenalty(options.penalty, options.penalty_rate, options.penalty_sign,
                                       options.penalty_min, options.penalty_max)

    def learn(self, model: Model, accuracy_dense: float) -> None:
        """Policy updates on the rewards of a model."""
        self.visited, self.expected = [], []
        for _ in range(self.options.iterations):
            ratios = self.walk.run(lambda states: self.agent.select_action(states)[0], self.options.episodes)[0]
            rewards = self._play(ratios.double().numpy(), model, accuracy_dense)
            for step in range(len(self.space.sizes)):  # only the last step is paid
                last = step == len(self.space.sizes) - 1
                self.agent.observe(REWARD_SCALE * rewards if last else torch.zeros(len(ratios)))
            self.agent.update_policy(MINIBATCH, self.options.epochs)

    def _play(self, ratios: np.ndarray, model: Model, accuracy_dense: float) -> torch.Tensor:
        """Rewards [episodes] of the agent's ratios [episodes, groups]."""
        groups, space = self.space.groups, self.space
        raw = groups.macs(np.maximum(1, np.rint(ratios * space.sizes))) / groups.dense_macs
        widths = space.project(ratios)
        drops, excess = model.drop(widths), np.maximum(0, raw / space.budget - 1)
        weights = self.penalty.weight(accuracy_dense, accuracy_dense - drops)
        rewards = -drops - weights * excess
        self.visited.append(widths)
        self.expected.append(drops)
        self.walk.behind = float(drops.mean())
        means = {"reward": rewards, "accuracy_drop": drops, "penalty": excess, "lambda": weights,
                 "raw_macs_ratio": raw, "macs_ratio": groups.macs(widths) / groups.dense_macs}
        self.records.append({"episode": (len(self.records) + 1) * len(ratios),
                             **{name: float(np.mean(values)) for name, values in means.items()},
                             "ratios": (widths / space.sizes).mean(0).round(4).tolist()})
        return torch.tensor(rewards, dtype=torch.float32)

    def favourites(self, known: np.ndarray, count: int) -> np.ndarray:
        """The allocations of this round with the least expected drop that have not been measured [count, groups]."""
        widths, first = np.unique(np.concatenate(self.visited), axis=0, return_index=True)
        fresh = ~(widths[:, None] == known[None]).all(2).any(1)
        expected = np.concatenate(self.expected)[first]
        return widths[fresh][np.argsort(expected[fresh], kind="stable")[:count]]


def _measured(environment: PruningEnvironment, space: Space, widths: np.ndarray, updates: list[int]) -> list[dict]:
    found = [environment.evaluate(row) for row in widths]
    return [{"updates": before, "accuracy_drop": environment.dense.accuracy - seen.accuracy, "loss": seen.loss,
             "macs_ratio": float(space.groups.macs(row)) / space.groups.dense_macs,
             "ratios": (row / space.sizes).round(4).tolist()} for before, row, seen in zip(updates, widths, found)]


def _choose(environment: PruningEnvironment, widths: np.ndarray, images: Images) -> np.ndarray:
    """Compares the measured allocations of lowest loss, and uniform widths, on more images."""
    order = np.argsort([environment.evaluate(row).loss for row in widths], kind="stable")[:FINALISTS]
    return min(widths[list(dict.fromkeys([0, *order.tolist()]))], key=lambda row: environment.loss_on(row, images))

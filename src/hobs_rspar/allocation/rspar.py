"""R-SPAR: a PPO agent walks through the groups, chooses a kept ratio for each, and is paid for accuracy.

State: features of the group, ratios so far, accuracy drop of the last episode. Action: kept ratio. After the last group
the ratios are projected so that the budget is met, and the projected plan is evaluated:

    reward = -(accuracy dense - accuracy pruned) - lambda(t) max(0, MACs(raw action) / budget - 1)

The penalty is that of the raw action; after projection it would always be 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.allocation.budget import project
from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.data import Images
from hobs_rspar.progress import bar

REWARD_SCALE = 100.0  # rewards are fractions of accuracy; the critic learns faster in points
FINALISTS = 8
CHOSEN = f"lowest loss on all validation images among the {FINALISTS} most accurate allocations and uniform widths"


@dataclass(frozen=True)
class Target:
    """The budget (kept fraction of the dense MACs), the floor of every group, and the tolerance."""

    macs: float
    min_ratio: float
    tolerance: float


@dataclass(frozen=True)
class Search:
    """The result of a search.

    Attributes:
        widths: of the chosen allocation [groups].
        episodes: one record per episode, in order.
        chosen: how the allocation was chosen, in words.
    """

    widths: np.ndarray
    episodes: list[dict]
    chosen: str


def search(environment: PruningEnvironment, relative: list[Tensor], target: Target, options, seed: int,
           finalists: Images) -> Search:
    """Runs the search.

    Args:
        environment: evaluates allocations.
        relative: per group the relative output error at every number of removed channels [channels].
        target: what to meet.
        options: the block of ``methods.hobs_rspar``.
        seed: of the agent.
        finalists: validation images on which the best allocations are compared once more.
    """
    groups = environment.groups
    features = _features(environment, relative, target)
    start = project(groups, np.ones(len(groups)), target.macs, target.min_ratio, target.tolerance)
    agent = RSPARAgent(len(groups), features.shape[1], options.hidden, options.learning_rate, options.gamma,
                       gae_lambda=options.gae_lambda, clip=options.clip, entropy=options.entropy,
                       initial_ratio=float((start / groups.sizes).mean()), seed=seed)
    penalty = AdaptivePenalty(options.penalty, options.penalty_rate, options.penalty_sign, options.penalty_min,
                              options.penalty_max)
    drop = environment.dense.accuracy - environment.evaluate(start).accuracy
    candidates, episodes = {tuple(start.tolist()): -drop}, []
    for _ in bar(range(options.iterations), "R-SPAR"):
        ratios = _walk(agent, features, drop, options.episodes)
        records = [_record(environment, row, target, penalty, candidates) for row in ratios.numpy().astype(float)]
        drop = float(np.mean([record["accuracy_drop"] for record in records]))
        _pay(agent, torch.tensor([record["reward"] for record in records]))
        agent.update_policy(batch_size=64, epochs=options.epochs)
        episodes += [{"episode": len(episodes) + i, **record} for i, record in enumerate(records)]
    return Search(_choose(environment, candidates, start, finalists), episodes, CHOSEN)


def _features(environment: PruningEnvironment, relative: list[Tensor], target: Target) -> Tensor:
    """Per group: position, share of channels, share of MACs saved by halving it, relative error at half its width."""
    groups = environment.groups
    halves = groups.sizes - np.diag(groups.sizes // 2)
    saved = 1 - groups.macs(halves) / groups.dense_macs
    error = [float(curve[group.channels // 2 - 1]) for curve, group in zip(relative, groups)]
    columns = [np.arange(len(groups)) / len(groups), groups.sizes / groups.sizes.max(),
               saved / max(saved.max(), 1e-12), np.array(error) / max(*error, 1e-12)]
    return torch.tensor(np.stack(columns, 1), dtype=torch.float32)


def _walk(agent: RSPARAgent, features: Tensor, drop: float, episodes: int) -> Tensor:
    """Parallel episodes: one ratio per group [episodes, groups]; the reward of all but the last step is 0."""
    ratios = torch.zeros(episodes, len(features))
    for step, feature in enumerate(features):
        state = torch.cat([feature.expand(episodes, -1), ratios, torch.full((episodes, 1), drop)], 1)
        ratios[:, step] = agent.select_action(state)[0]
        if step < len(features) - 1:
            agent.observe(torch.zeros(episodes))
    return ratios


def _pay(agent: RSPARAgent, rewards: Tensor) -> None:
    """The reward of the last step, in points."""
    agent.observe(REWARD_SCALE * rewards.float())


def _record(environment: PruningEnvironment, ratios: np.ndarray, target: Target, penalty: AdaptivePenalty,
            candidates: dict) -> dict:
    """Evaluates one episode's ratios."""
    groups = environment.groups
    raw = float(groups.macs(np.maximum(1, np.rint(ratios * groups.sizes)))) / groups.dense_macs
    widths = project(groups, ratios, target.macs, target.min_ratio, target.tolerance)
    seen = environment.evaluate(widths)
    weight = penalty.weight(environment.dense.accuracy, seen.accuracy)
    excess = max(0.0, raw / target.macs - 1)
    drop = environment.dense.accuracy - seen.accuracy
    candidates[tuple(widths.tolist())] = -drop
    return {"reward": -drop - weight * excess, "accuracy_drop": drop, "loss": seen.loss, "penalty": excess,
            "lambda": weight, "raw_macs_ratio": raw, "macs_ratio": float(groups.macs(widths)) / groups.dense_macs,
            "ratios": (widths / groups.sizes).round(4).tolist()}


def _choose(environment: PruningEnvironment, candidates: dict, start: np.ndarray, images: Images) -> np.ndarray:
    """Compares the most accurate allocations, and uniform widths, by their loss on more images."""
    best = sorted(candidates, key=lambda widths: (-candidates[widths], environment.evaluate(np.array(widths)).loss))
    finalists = [np.array(widths) for widths in dict.fromkeys([tuple(start.tolist()), *best[:FINALISTS]])]
    return min(finalists, key=lambda widths: environment.loss_on(widths, images))

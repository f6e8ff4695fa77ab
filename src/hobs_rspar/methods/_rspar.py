"""A measured search on any order of elimination: what ``hobs_rspar`` and its variants share."""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hobs_rspar.allocation.climber import Climber
from hobs_rspar.allocation.environment import PruningEnvironment, affordable
from hobs_rspar.allocation.measured_search import search
from hobs_rspar.allocation.rspar import DQNPlayer, PPOPlayer
from hobs_rspar.allocation.space import HeldSpace
from hobs_rspar.allocation.walk import features
from hobs_rspar.config import Positive, Section, Share
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

NonNegative = Annotated[float, Field(ge=0)]


class Options(Section):
    """Options of the search; params.yaml says what each is for."""

    allocator: Literal["local_search", "ppo", "dqn"] = "local_search"
    first: Annotated[int, Field(ge=4)] = 12
    rounds: Positive = 3
    measured: Positive = 4
    images: Annotated[int, Field(ge=1000)] = 1024
    iterations: Positive = 16
    episodes: Positive = 64
    hidden: Positive = 256
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    entropy: NonNegative = 0.01
    epochs: Positive = 4
    penalty: NonNegative = 0.01
    penalty_rate: NonNegative = 2.5
    penalty_min: NonNegative = 1e-4
    penalty_max: NonNegative = 0.1
    penalty_sign: Literal[-1, 1] = -1


def searched(context: Context, options: Options, scores: Sequence[Tensor], relative: Sequence[Tensor], criterion: str,
             repair: str = "least_squares") -> PruningPlan:
    """The plan that the search finds.

    Args:
        context: of the method.
        options: of the search.
        scores: per group; the lowest goes first [channels].
        relative: per group the relative output error after each elimination in that order [channels].
        criterion: in words.
        repair: of the plan, and of every allocation that the search measures.
    """
    order = [torch.argsort(score, stable=True) for score in scores]
    refit = repair == "least_squares"
    environment = PruningEnvironment(context.network, context.groups, order, context.factors if refit else {},
                                     affordable(context.calibration, 256, 1 / 4),
                                     affordable(context.validation, options.images), refit)
    given = context.space
    space = HeldSpace(given.groups, given.budget, given.min_ratio, given.tolerance, given.expense)
    tables = curves(scores, order, relative)
    if options.allocator == "local_search":
        proposer, name = Climber(space, context.derived_seed), "local search"
    else:
        halved = np.array([curve[size - size // 2, 0] for curve, size in zip(tables, space.sizes)])
        player, name = {"ppo": (PPOPlayer, "R-SPAR"), "dqn": (DQNPlayer, "R-SPAR with DQN")}[options.allocator]
        proposer = player(space, features(space, halved), options, context.derived_seed)
    found = search(environment, tables, space, proposer, options, context.derived_seed,
                   affordable(context.validation, 2 * options.images, 2))
    history = {"evaluations": environment.evaluations, "images": environment.images, "chosen": found.chosen,
               "episodes": found.episodes, "measured": found.measured}
    ranks = [torch.argsort(channels) for channels in order]  # the very order that was evaluated, ties included
    return context.keep_best(ranks, found.widths, f"{criterion}, {name}", repair=repair, search=history)


def curves(scores: Sequence[Tensor], order: Sequence[Tensor], relative: Sequence[Tensor]) -> list[np.ndarray]:
    """Predicted loss and relative error of every width of each group, from 0 to all channels [channels + 1, 2]."""
    removed = [torch.stack([score[channels], error], 1) for score, channels, error in zip(scores, order, relative)]
    return [np.concatenate([part.numpy()[::-1], np.zeros((1, 2))]) for part in removed]


def first_removed(scores: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a criterion that scores channels one by one has for :func:`searched`.

    Args:
        scores: per group [channels], not negative.

    Returns:
        Per group the score of a channel and all that go before it, which ranks as the scores do, and its share of the
        group's sum in order of removal: sums of single scores in place of H-OBS's predicted loss and relative error.
    """
    sums, shares = [], []
    for score in scores:
        order = torch.argsort(score, stable=True)
        total = score[order].double().cumsum(0)
        sums.append(torch.empty_like(total).scatter_(0, order, total))
        shares.append(total / total[-1].clamp_min(1e-30))
    return sums, shares

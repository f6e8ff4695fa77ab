"""H-OBS/R-SPAR: second-order sensitivity of coupled channels, budgets allocated by PPO with an adaptive penalty.

Criterion: structured Optimal Brain Surgeon on the consumers' inputs with Kronecker factors (curvature/hobs.py).
Allocator: R-SPAR (allocation/rspar.py); every reward is measured on the pruned and repaired network with validation
images. Repair: least-squares refit of the consumers. The source documents' formulas that contradict their own claims
(w^2 H_ii called OBS, lambda(t) without t) are implemented as what they name; see docs/methods.md.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.rspar import search
from hobs_rspar.allocation.space import Space
from hobs_rspar.config import Positive, Section, Share
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan

NonNegative = Annotated[float, Field(ge=0)]


class Options(Section):
    """Options of the search; params.yaml says what each is for."""

    first: Annotated[int, Field(ge=4)] = 12
    rounds: Positive = 3
    measured: Positive = 4
    iterations: Positive = 24
    episodes: Positive = 64
    hidden: Positive = 256
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    gamma: Share = 1.0
    gae_lambda: Share = 0.95
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    entropy: NonNegative = 0.01
    epochs: Positive = 8
    images: Annotated[int, Field(ge=1000)] = 1024
    penalty: NonNegative = 0.01
    penalty_rate: NonNegative = 2.5
    penalty_min: NonNegative = 1e-4
    penalty_max: NonNegative = 0.1
    penalty_sign: Literal[-1, 1] = -1


def plan(context: Context, options: Options) -> PruningPlan:
    scores = context.per_group(context.sensitivity["hobs"])
    order = [torch.argsort(score, stable=True) for score in scores]
    relative = context.per_group(context.sensitivity["relative"])
    environment = PruningEnvironment(context.network, context.groups, order, context.factors,
                                     context.calibration.first(256), context.validation.first(options.images))
    space = Space(context.groups, context.budget, context.min_ratio, context.tolerance)
    found = search(environment, curves(scores, order, relative), space, options, context.derived_seed,
                   context.validation.first(2 * options.images))
    history = {"evaluations": environment.evaluations, "images": environment.images, "chosen": found.chosen,
               "episodes": found.episodes, "measured": found.measured}
    ranks = [torch.argsort(channels) for channels in order]  # the very order that was evaluated, ties included
    return context.keep_best(ranks, found.widths, "H-OBS, R-SPAR", repair="least_squares", search=history)


def curves(scores: list[Tensor], order: list[Tensor], relative: list[Tensor]) -> list[np.ndarray]:
    """Predicted loss and relative error of every width of each group, from 0 to all channels [channels + 1, 2]."""
    removed = [torch.stack([score[channels], error], 1) for score, channels, error in zip(scores, order, relative)]
    return [np.concatenate([part.numpy()[::-1], np.zeros((1, 2))]) for part in removed]

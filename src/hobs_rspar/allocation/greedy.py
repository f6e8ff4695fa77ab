"""Backward greedy: channels that cost the least reward for what they save go first, until the budget is met."""

from __future__ import annotations

import math

import numpy as np

from hobs_rspar.allocation.trial import Trial


def search(trial: Trial, generator: np.random.Generator) -> None:
    """Greedy elimination from the dense network: each step tries every group.

    Where evaluations are few, steps remove several channels. The generator is not used: there is no random choice.
    """
    space = trial.space
    removals = (space.sizes - space.uniform).sum() + len(space.sizes)  # about as many as uniform widths remove
    step = math.ceil(removals * len(space.sizes) / max(1, trial.left - len(space.sizes)))
    least = 1e-9 * space.expense.dense
    widths, score = space.sizes, float(trial.score(space.sizes[None])[0])
    while (over := float(space.expense.of(widths) - space.ceiling)) > 0:
        options = np.maximum(widths - step * np.eye(len(widths), dtype=int), space.low)
        options = options[(options < widths).any(1)]
        saved = (space.expense.of(widths) - space.expense.of(options)).clip(least, max(over, least))
        scores = trial.score(options)
        best = int(np.argmin((score - scores) / saved))
        widths, score = options[best], float(scores[best])
    trial.score(space.complete(widths[None].astype(float)))

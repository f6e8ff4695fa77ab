"""Simulated annealing (Kirkpatrick et al. 1983) by channels moved between groups."""

from __future__ import annotations

import math

import numpy as np

from hobs_rspar.allocation.trial import Trial

WARM = 24  # neighbours of uniform widths whose differences set the first temperature
COLD = 1e-3  # last temperature, relative to the first
LONGEST = 8  # channels moved at once, at most


def search(trial: Trial, generator: np.random.Generator) -> None:
    """One chain, cooled geometrically over what may be spent."""
    space = trial.space
    here, score = trial.best, trial.score_of_best
    near = trial.score(space.disturbed(np.repeat(here[None], WARM, 0), LONGEST, generator))
    hot = max(float(np.abs(near - score).mean()), 1e-12)
    while True:
        candidate = space.disturbed(here[None], LONGEST, generator)
        found = float(trial.score(candidate)[0])
        temperature = hot * COLD**trial.progress
        if found >= score or generator.random() < math.exp((found - score) / temperature):
            here, score = candidate[0], found


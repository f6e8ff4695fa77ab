"""CMA-ES (Hansen & Ostermeier 2001) on the kept ratios, projected on the budget."""

from __future__ import annotations

import numpy as np
from cmaes import CMA

from hobs_rspar.allocation.trial import Trial

SPREAD = 0.1  # first standard deviation of the ratios


def search(trial: Trial, generator: np.random.Generator) -> None:
    """CMA-ES from uniform widths; once converged, another one from elsewhere, with twice the population."""
    space = trial.space
    bounds = np.stack([np.minimum(space.low / space.sizes, 0.99), np.ones(len(space.sizes))], 1)
    start, population = np.clip(space.uniform / space.sizes, *bounds.T), None  # the library's default population
    while True:
        strategy = CMA(start, SPREAD, bounds, seed=int(generator.integers(2**32)), population_size=population)
        before = trial.left + 1
        while trial.left < before and not strategy.should_stop():  # nothing new in a generation: converged
            before = trial.left
            points = np.stack([strategy.ask() for _ in range(strategy.population_size)])
            strategy.tell(list(zip(points, -trial.score(space.project(points)))))
        start, population = generator.uniform(*bounds.T), 2 * strategy.population_size

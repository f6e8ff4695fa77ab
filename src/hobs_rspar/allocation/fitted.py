"""A reward by look-up that is fitted to measured allocations.

H-OBS predicts, for every width of every group, the loss that the removals add and the relative error of the consumers'
outputs. Their sums rank allocations well, but an optimiser finds where they are wrong. So each group's two curves get
weights of their own, by ridge regression of the log loss of allocations that were really pruned, repaired and run on
validation images; a group about which the measurements say nothing keeps the common weight. And the reward is
pessimistic: the further an allocation lies from what was measured, the less its prediction counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RIDGE = 0.5  # in units of one measured allocation, with every curve scaled to a mean of 1 over groups at the centre
PESSIMISM = 2.0  # standard errors of the prediction that are taken off the reward


class FittedReward:
    """Predicts minus the log loss of allocations, less its uncertainty.

    Args:
        curves: per group the predicted loss and the relative error of every width, from 0 to all of its channels
            [channels + 1, 2].
        widths: measured allocations [n, groups]; the first is the centre.
        losses: cross entropy of each after repair [n].
    """

    def __init__(self, curves: Sequence[np.ndarray], widths: np.ndarray, losses: np.ndarray):
        self.curves, self.scale = curves, 1.0
        self.scale = self._values(widths[:1]).mean(1).clip(min=1e-12)
        values, y = self._features(widths), np.log(losses)
        self.centre, self.level = values.mean(0), y.mean()
        x = values - self.centre
        prior = self._prior(x, y - self.level)
        self.inverse = np.linalg.inv(x.T @ x + RIDGE**2 * np.eye(x.shape[1]))
        self.weights = prior + self.inverse @ x.T @ (y - self.level - x @ prior)
        self.noise = float(np.sqrt(np.mean((y - self.level - x @ self.weights) ** 2)))

    def score(self, widths: np.ndarray) -> np.ndarray:
        """Rewards [n] of kept channels [n, groups]."""
        x = self._features(widths) - self.centre
        uncertain = np.sqrt(((x @ self.inverse) * x).sum(1))
        return -(self.level + x @ self.weights + PESSIMISM * self.noise * uncertain)

    def _values(self, widths: np.ndarray) -> np.ndarray:
        """Both curves of every group at its width [n, groups, 2], scaled."""
        return np.stack([curve[column] for curve, column in zip(self.curves, widths.T)], 1) / self.scale

    def _features(self, widths: np.ndarray) -> np.ndarray:
        """[n, 2 * groups]: the predicted losses, then the relative errors."""
        return self._values(widths).transpose(0, 2, 1).reshape(len(widths), -1)

    def _prior(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """The same weight for the predicted loss of every group, none for the relative errors [2 * groups]."""
        total = x[:, :len(self.curves)].sum(1)
        slope = max(0.0, total @ y / max(total @ total, 1e-12))
        return np.repeat([slope, 0.0], len(self.curves))

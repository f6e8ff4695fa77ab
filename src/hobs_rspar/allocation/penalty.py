"""The adaptive penalty weight lambda(t) of R-SPAR."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class AdaptivePenalty:
    """lambda = lambda_0 exp(sign tau (accuracy dense - accuracy pruned)), kept within a range.

    As published (sign -1) it has no time in it, and it weakens as the damage grows; ``sign=1`` is the corrected form.
    Accuracies are fractions: in percentage points the exponent would sit on the lower bound from 1.84 points on.

    Attributes:
        initial: lambda_0.
        rate: tau.
        sign: -1 as published, 1 corrected.
        least: lower bound.
        most: upper bound.
    """

    initial: float = 0.01
    rate: float = 2.5
    sign: int = -1
    least: float = 1e-4
    most: float = 0.1

    def weight(self, accuracy_dense: float, accuracy_pruned: float | np.ndarray) -> float | np.ndarray:
        """Lambda for accuracies, as fractions; one for each pruned network."""
        value = self.initial * np.exp(self.sign * self.rate * (accuracy_dense - accuracy_pruned))
        return np.clip(value, self.least, self.most)

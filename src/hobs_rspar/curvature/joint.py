"""The joint second-order model: the loss of removing any *set* of channels, cross terms included.

    dL(d) = -first . d + 1/2 d^T H d,      d = 1 for removed channels, 0 for the others

With H = S^T S / N of the gate gradients S, one sweep predicts all 2^C sets of a network; the diagonal alone, which
single-channel scores add up, misses what channels do together (SOSP-H: Nonnenmacher et al., ICLR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class JointModel:
    """A quadratic model of the loss over sets of removed channels.

    Attributes:
        first: signed first-order gain of removing each channel [C].
        hessian: second-order terms, symmetric [C, C].
    """

    first: Tensor
    hessian: Tensor

    @classmethod
    def of_gates(cls, true_rows: Tensor, rows: Tensor) -> JointModel:
        """The model of gate gradients [N, C].

        Args:
            true_rows: of the true labels.
            rows: of sampled labels (H is the Fisher), or the true ones again (empirical Fisher).
        """
        rows = rows.double()
        return cls(true_rows.double().mean(0), rows.T @ rows / len(rows))

    def within(self, channels: slice) -> JointModel:
        """The model of some channels alone, all others staying."""
        return JointModel(self.first[channels], self.hessian[channels, channels])

    def loss(self, removed: Tensor) -> Tensor:
        """Predicted loss change [...] of the sets ``removed`` [..., C] (1 removed, 0 kept)."""
        removed = removed.to(self.hessian)
        return 0.5 * ((removed @ self.hessian) * removed).sum(-1) - removed @ self.first

    def eliminate(self, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Greedy backward elimination: always the channel whose removal adds the least predicted loss next.

        Args:
            candidates: channels that may go [k]; None: all.

        Returns:
            Channels in the order of their removal [k], and the loss that each added [k].
        """
        left = torch.arange(len(self.first)) if candidates is None else candidates.clone()
        added = 0.5 * self.hessian.diagonal() - self.first  # by the next removal, given all before
        order, costs = torch.empty_like(left), self.first.new_empty(len(left))
        waiting = torch.zeros_like(added, dtype=torch.bool).index_fill(0, left, True)
        for step in range(len(left)):
            channel = added.masked_fill(~waiting, torch.inf).argmin()
            order[step], costs[step] = channel, added[channel]
            waiting[channel] = False
            added = added + self.hessian[channel]
        return order, costs

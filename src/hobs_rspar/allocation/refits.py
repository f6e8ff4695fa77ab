"""What a refit from stored covariances adds to the weights of a group's consumers, at every width.

Channels have a fixed order of removal. So the covariance of a wide consumer is factorised once, its columns in reverse
order of removal: what is left at a width is a leading block, and its factor a leading block of the factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.consumers import consumers
from hobs_rspar.curvature.elimination import Consumer
from hobs_rspar.curvature.pools import regularly
from hobs_rspar.curvature.repair import refit_weight

SOLVED = 640  # columns up to which every width is solved anew, in double precision; twice those of a CIFAR ResNet
KEPT = 2**27  # bytes of changes that are kept for the next allocation with the same width


class Refits:
    """Changes of weights by group and width; the last ones are kept.

    Args:
        network: dense; its weights are read.
        groups: of the network.
        order: per group the channels, the first to go first.
        factors: of the groups' consumers; those without are left as they are.
        ridge: relative to the mean diagonal of a covariance.
    """

    def __init__(self, network: nn.Module, groups: Groups, order: Sequence[Tensor], factors: Mapping[str, Tensor],
                 ridge: float):
        self.network, self.groups, self.order, self.factors, self.ridge = network, groups, order, factors, ridge
        self._known: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._roots: dict[int, list[_Root]] = {}

    def change(self, g: int, width: int) -> dict[str, Tensor]:
        """Weight name -> what is added to it when group ``g`` keeps its last ``width`` channels."""
        found = self._known.pop((g, width), None)
        if found is None:
            found = self._computed(g, self.order[g][:self.groups[g].channels - width])
        self._known[g, width] = found  # as the last one
        while len(self._known) > 1 and sum(map(_bytes, self._known.values())) > KEPT:
            del self._known[next(iter(self._known))]
        return found

    def _computed(self, g: int, gone: Tensor) -> dict[str, Tensor]:
        changes: dict[str, Tensor] = {}
        for root in self._of(g) if len(gone) else ():
            layer, number = root.source
            weight = self.network.get_submodule(layer).weight
            change = changes.setdefault(f"{layer}.weight", torch.zeros(weight.shape).to(weight))
            rows = change.view(-1, len(root.weight), change[0].numel())[number]
            columns = slice(None) if root.block is None else root.block.to(rows.device)
            rows[:, columns] = root.change(gone).to(rows)
        return changes

    def _of(self, g: int) -> list[_Root]:
        if g not in self._roots:
            parts = consumers(self.groups[g], self.network, self.factors)
            self._roots[g] = [_Root(part, self.order[g], self.ridge) for part in parts]
        return self._roots[g]


def _bytes(change: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in change.values())


class _Root:
    """One consumer, ready to be refitted at every width: its covariance, or the factor of it.

    Attributes:
        source: the layer, and which of its convolution groups this is.
        block: see :class:`hobs_rspar.curvature.elimination.Consumer`.
        weight: flattened [outputs, d].
    """

    def __init__(self, part: Consumer, order: Tensor, ridge: float):
        self.source, self.block, self.ridge = part.source, part.block, ridge
        own = torch.arange(len(order)) if part.channels is None else part.channels
        self.place = torch.full((len(order),), -1).index_put_((own,), torch.arange(len(own)))
        self.columns, self.weight = part.columns, part.weight.flatten(1)
        self.wide = len(part.covariance) > SOLVED
        if self.wide:
            self._factorise(part.covariance, order)
        else:
            self.covariance = part.covariance

    def change(self, gone: Tensor) -> Tensor:
        """What the refit adds to the flattened weight without the channels ``gone``, the first to go."""
        dead = self._columns_of(gone)
        if self.wide:
            return self._by_root(self.weight.shape[1] - len(dead))
        keep = torch.ones(self.weight.shape[1], dtype=torch.bool).index_fill(0, dead, False)
        return refit_weight(self.weight, self.covariance, keep.nonzero()[:, 0], self.ridge) - self.weight

    def _columns_of(self, channels: Tensor) -> Tensor:
        own = self.place[channels]
        return self.columns[own[own >= 0]].flatten()

    def _factorise(self, covariance: Tensor, order: Tensor) -> None:
        mine = self._columns_of(order.flip(0))
        others = torch.ones(len(covariance), dtype=torch.bool).index_fill(0, mine, False).nonzero()[:, 0]
        self.ordered = torch.cat([others, mine])
        ordered = covariance[self.ordered][:, self.ordered]
        self.root = regularly(torch.linalg.cholesky, ordered, self.ridge)[1].float()
        self.weight = self.weight[:, self.ordered].float()

    def _by_root(self, left: int) -> Tensor:
        """With A = L L^T and the first k columns left: W_D A_Dk A_kk^-1 = (W_D L_Dk) L_kk^-1."""
        lost = self.weight[:, left:] @ self.root[left:, :left]
        found = torch.zeros_like(self.weight)
        found[:, self.ordered[:left]] = torch.linalg.solve_triangular(self.root[:left, :left], lost, upper=False,
                                                                      left=False)
        return found

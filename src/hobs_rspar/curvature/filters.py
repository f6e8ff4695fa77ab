"""Scores of output filters, where they are produced: K-FAC's OBD and OBS of the removal of a whole filter w_i.

With F ~ A (x) G of the filter's own layer (G as :mod:`hobs_rspar.curvature.kfac` scales it) the costs of w_i <- 0 are

    obd       1/2 G_ii sum_j A_jj w_ij^2          the published w^2 H_ii, summed over the filter
    kron_obd  1/2 G_ii w_i^T A w_i                all of A: equal to 1/2 G_ii E[sum_t z_i^2], so A is not needed
    kron_obs  1/2 w_i^T A w_i / [G^-1]_ii         the other filters compensating (EigenDamage: Wang et al., ICML 2019)

The bias, with its constant input, goes with the filter. A coupled channel costs the sum over its producers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.kfac import damped, input_diagonal
from hobs_rspar.curvature.layout import Pass, by_image, channel_axis
from hobs_rspar.curvature.passes import products
from hobs_rspar.folding import Norms, slope


class FilterMoments:
    """Watches a sweep: second moments of all producers' outputs z and of the gradients g that reach them.

    Args:
        network: that the sweep passes.
        groups: of the network.
    """

    def __init__(self, network: nn.Module, groups: Groups):
        names = [member.layer for group in groups for member in group.with_role("producer", "depthwise")]
        self.layers = {name: network.get_submodule(name) for name in names}
        self.network, self.norms, self._pass = network, {}, Pass()
        self.images = 0
        self._positions: dict[str, int] = {}
        self._outputs: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, norms: Norms) -> Iterator[None]:
        """Hooks on all producers inside the ``with`` block, in which ``norms`` are folded."""
        self.norms = norms
        hooks = [self._pass.watch(self.network)]
        hooks += [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def collect(self) -> None:
        """Counts the images of the last pass; their sums have grown on the way."""
        self.images += self._pass.images

    def energy(self, name: str) -> Tensor:
        """E[sum_t z^2] of a producer's own outputs [outputs]: T (running_var + running_mean^2) before a batch norm."""
        if name not in self._positions:
            return self._nothing(name)
        if name not in self.norms:
            return self._outputs[name].cpu() / self.images
        norm = self.norms[name]
        return self._positions[name] * (norm.running_var + norm.running_mean.square()).cpu()

    def fisher(self, name: str) -> Tensor:
        """Diagonal of a producer's G: E[(1/T) sum_t g^2] [outputs]."""
        if name not in self._slopes:
            return self._nothing(name)
        seen = self._slopes[name].cpu() / (self.images * self._positions[name])
        return seen * slope(self.norms[name]).cpu().square() if name in self.norms else seen

    def _nothing(self, name: str) -> Tensor:
        """Of a layer that the network does not call, or whose output has no part in the loss."""
        layer = self.layers[name]
        return torch.zeros(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)

    def _hook(self, name: str):
        def watch(layer: nn.Module, _inputs, out: Tensor) -> None:
            if len(out) % max(1, self._pass.images):
                return  # of a table that all images share
            axis = channel_axis(layer)
            z = by_image(layer, out.detach(), self._pass.images)
            self._positions[name] = z[0].numel() // z.shape[axis]
            if name not in self.norms:
                self._outputs[name] = self._outputs.get(name, 0) + products(z, z, axis).sum(0)
            if out.requires_grad:
                out.register_hook(read)

        def read(gradient: Tensor) -> None:
            layer = self.layers[name]
            g = by_image(layer, gradient, self._pass.images)
            self._slopes[name] = self._slopes.get(name, 0) + products(g, g, channel_axis(layer)).sum(0)
        return watch


def kron_obd(groups: Groups, moments: FilterMoments) -> Tensor:
    """1/2 G_ii E[sum_t z_i^2], from a sweep alone [channels of all groups]."""
    return _coupled(groups, lambda name: 0.5 * moments.fisher(name) * moments.energy(name))


def filter_scores(groups: Groups, moments: FilterMoments, factors: dict[str, Tensor],
                  damping: float) -> dict[str, Tensor]:
    """All scores of this module [channels of all groups].

    Args:
        groups: of the network.
        moments: of a sweep with sampled labels.
        factors: ``<layer>/a`` and ``<layer>/g`` of all layers; where a layer has none (its patches do not give its
            output), its ``kron_obd``, which needs none, stands for the other two.
        damping: of G where it is inverted, relative to its mean diagonal.
    """
    def whole(name: str) -> Tensor:
        return 0.5 * moments.fisher(name) * moments.energy(name)

    def diagonal(name: str) -> Tensor:
        if f"{name}/a" not in factors:
            return whole(name)
        weight, bias = moments.layers[name].weight.detach().cpu(), moments.layers[name].bias
        a, fisher = input_diagonal(factors, name, moments.layers[name]), moments.fisher(name)
        rows = weight.square().reshape(len(a), len(weight) // len(a), -1)  # [groups, outputs per group, d]
        own = (rows * a[:, None, :-1]).sum(2).flatten()
        return 0.5 * fisher * (own if bias is None else own + bias.detach().cpu().square() * a[0, -1])

    def compensated(name: str) -> Tensor:
        if f"{name}/g" not in factors:
            return whole(name)
        inverse = torch.linalg.inv(damped(factors[f"{name}/g"].double(), damping)).diagonal(dim1=1, dim2=2).flatten()
        return 0.5 * moments.energy(name) / inverse

    return {"obd": _coupled(groups, diagonal), "kron_obd": kron_obd(groups, moments),
            "kron_obs": _coupled(groups, compensated)}


def _coupled(groups: Groups, cost) -> Tensor:
    """Sums a cost of filters (layer name -> [outputs]) over the producers of every channel [channels of all groups]."""
    costs = [sum(cost(member.layer)[torch.tensor(member.index)].sum(1)
                 for member in group.with_role("producer", "depthwise")) for group in groups]
    return torch.cat([part.float() for part in costs])

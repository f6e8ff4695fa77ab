"""The least-squares refit where not all images fit at once: batches that wait for each other at every layer and norm.

Each layer is refitted, and each batch norm estimated, from what all batches give there, before any of them goes on: the
result is that of one pass of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hobs_rspar.curvature.kfac import output_rows, patches
from hobs_rspar.curvature.lockstep import alive, in_step
from hobs_rspar.curvature.observe import Observed
from hobs_rspar.curvature.refit import Moments
from hobs_rspar.data import Images

WAITING = 3 * 2**28  # bytes of activations that batches hold while they wait for each other


def refit_in_step(pruned: nn.Module, dense: nn.Module, layers: Observed, batches: Sequence[Images],
                  ridge: float) -> tuple[list[float], bool]:
    """Refits all layers and estimates all batch norms that are called once.

    Args:
        pruned: after surgery, in evaluation mode; changed in place.
        dense: the network before.
        layers: that are refitted.
        batches: all images.
        ridge: relative to the mean diagonal of the inputs' covariance.

    Returns:
        The layers' relative errors, in order of execution, and whether all batch norms were estimated.
    """
    image = _normalised(batches[0])[:1]
    order, norms = _order(pruned, image, layers), _norms(pruned)
    stops = {name: name in layers.positions for name in order}
    estimates = {name: _Estimate(pruned.get_submodule(name)) for name in order if not stops[name]}
    moments: dict[str, Moments] = {}
    errors: list[float] = []

    def see(name: str, number: int, x: Tensor, out: Tensor | None) -> None:
        if not stops[name]:
            return estimates[name].add(x)
        rows, target = _compared(pruned, dense, layers, (name, len(batches[number])), x, out)
        moments.setdefault(name, Moments(pruned.get_submodule(name))).add(rows, target)

    def done(name: str) -> None:
        if stops[name]:
            errors.append(moments.pop(name).refit(ridge))
        else:
            estimates[name].put()

    in_step((pruned, dense), stops, [partial(_normalised, batch) for batch in batches],
            _together(pruned, dense, stops, image, len(batches[0])), see, done)
    return errors, len(estimates) == len(norms)


def _compared(pruned: nn.Module, dense: nn.Module, layers: Observed, place: tuple[str, int], x: Tensor,
              out: Tensor) -> tuple[Tensor, Tensor]:
    """Input patches of a pruned layer with so many images, and what the dense one gives there without its bias."""
    name, count = place
    layer, where = dense.get_submodule(name), layers.positions[name]
    target = output_rows(layer, out, where, count)
    target = target if layer.bias is None else target - layer.bias
    rows = patches(pruned.get_submodule(name), x, where, count)[0]
    return rows, target if name not in layers.left else target[:, layers.left[name].to(target.device)]


def _normalised(images: Images) -> Tensor:
    return images.normalised(images.pixels)


def _norms(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats]


@torch.no_grad()
def _order(network: nn.Module, image: Tensor, layers: Observed) -> list[str]:
    """Layers to refit, and batch norms that are called once, as they are executed."""
    calls: list[str] = []
    hooks = [network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.append(name))
             for name in (*layers.names, *_norms(network))]
    try:
        network(image)
    finally:
        for handle in hooks:
            handle.remove()
    return [name for name in dict.fromkeys(calls) if calls.count(name) == 1]


def _together(pruned: nn.Module, dense: nn.Module, stops: dict[str, bool], image: Tensor, size: int) -> list[int]:
    """How many batches of so many images may wait at each stop; a batch that has come stays."""
    held = np.array(alive(pruned, list(stops), image))
    beside = dict(zip([name for name in stops if stops[name]],
                      alive(dense, [name for name in stops if stops[name]], image)))
    last = 0
    for i, name in enumerate(stops):  # between two of its own stops the dense pass waits at the earlier one
        last = beside.get(name, last)
        held[i] += last
    return np.maximum(1, np.minimum.accumulate((WAITING // (held * size))[::-1])[::-1]).astype(int).tolist()


class _Estimate:
    """Mean and variance of what a batch norm gets, over batches."""

    def __init__(self, norm: nn.Module):
        self.norm, self.count = norm, 0
        self.total = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        self.squares = self.total.clone()

    def add(self, x: Tensor) -> None:
        dims = [dim for dim in range(x.dim()) if dim != 1]
        self.count += x.numel() // x.shape[1]
        self.total += x.sum(dims, dtype=torch.float64)
        self.squares += x.square().sum(dims, dtype=torch.float64)

    def put(self) -> None:
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp_min(0)
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance * self.count / max(1, self.count - 1))

"""Kronecker factors of the Fisher of convolutions and linear layers (KFC: Grosse & Martens 2016), by hooks.

For a layer z = W a with output gradients g at T positions per image:

    A = E[sum_t a a^T],   G = E[(1/T) sum_t g g^T],   Fisher of W ~ A (x) G

with g of each image's own loss and labels drawn from the network. Each patch ``a`` ends in a constant 1, so that A
also holds the mean input (last column / A[-1, -1]) and the number of positions (A[-1, -1] = T).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hobs_rspar.folding import Norms, slope
from hobs_rspar.errors import UserError


@dataclass
class Factors:
    """Running sums of one layer.

    Attributes:
        a: input factor [groups, d + 1, d + 1], d = inputs per group x kernel area.
        g: output factor [groups, outputs per group, outputs per group].
        images: images summed.
    """

    a: Tensor
    g: Tensor
    images: int = 0


def patches(layer: nn.Module, x: Tensor, positions: Tensor | None) -> tuple[Tensor, float]:
    """Input patches of a layer, with a constant 1 at the end.

    Args:
        layer: convolution (any stride, padding, dilation, groups) or linear.
        x: its input [N, C, H, W] or [N, features].
        positions: output positions to take [P]; None takes all.

    Returns:
        Patches [groups, N * P, d + 1], and the factor T / P that makes their sum an estimate over all positions.
    """
    if isinstance(layer, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
        return torch.cat([rows, torch.ones_like(rows[..., :1])], -1), 1.0
    if isinstance(layer.padding, str):
        raise UserError(f"a convolution with padding='{layer.padding}' is not supported; write the padding as numbers")
    total = math.prod(output_size(layer, tuple(x.shape[-2:])))
    if positions is None:  # where all patches are wanted, the library's own gathering is the faster one
        taken = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        taken = taken.view(len(x), layer.groups, -1, total).permute(1, 0, 3, 2)
    else:
        taken = _at(layer, x, positions)
    rows = taken.new_ones(*taken.shape[:-1], taken.shape[-1] + 1)
    rows[..., :-1] = taken
    return rows.flatten(1, 2), total / taken.shape[2]


def _at(layer: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Input patches at some output positions: [groups, N, P, d]."""
    index = _patch_index(layer, x.shape[-2:], positions)
    bottom, right = layer.padding
    padded = nn.functional.pad(x, (right, right, bottom, bottom)).flatten(2)
    taken = padded[:, :, index.to(x.device)]  # [N, C, P, k*k]
    count, channels, number, area = taken.shape
    taken = taken.view(count, layer.groups, channels // layer.groups, number, area).permute(1, 0, 3, 2, 4)
    return taken.reshape(layer.groups, count, number, -1)


def output_size(layer: nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a convolution's output for an input of ``size``."""
    return tuple((size[i] + 2 * layer.padding[i] - layer.dilation[i] * (layer.kernel_size[i] - 1) - 1)
                 // layer.stride[i] + 1 for i in range(2))


def _patch_index(layer: nn.Conv2d, size, positions: Tensor) -> Tensor:
    """Flat indices [P, k*k] of patches in the padded input."""
    _, width = output_size(layer, tuple(size))
    where = positions.cpu()
    top, left = where // width * layer.stride[0], where % width * layer.stride[1]
    rows = top[:, None] + torch.arange(layer.kernel_size[0]) * layer.dilation[0]
    columns = left[:, None] + torch.arange(layer.kernel_size[1]) * layer.dilation[1]
    flat = rows[:, :, None] * (size[1] + 2 * layer.padding[1]) + columns[:, None, :]
    return flat.flatten(1)


def sampled_positions(layer: nn.Module, x: Tensor, count: int | None, generator) -> Tensor | None:
    """Random output positions, the same for all images of a batch; None (all) where the layer has no more."""
    if count is None or isinstance(layer, nn.Linear):
        return None
    height, width = output_size(layer, tuple(x.shape[-2:]))
    if height * width <= count:
        return None
    return torch.randperm(height * width, generator=generator)[:count].sort().values


class KFACHessianApproximator:
    """K-FAC factors of all convolutions (strided, dilated, grouped, depthwise) and linear layers.

    Usage: ``register_hooks()``; then for every batch forward, ``backward()`` of the *summed* loss, and
    ``update_factors()``. It is also a watcher of :func:`hobs_rspar.curvature.passes.sweep`.

    Args:
        model: hooks are added by ``register_hooks`` and removed by ``remove_hooks``.
        damping: added to the factors' diagonals by ``inverse``, relative to their mean diagonal.
        update_freq: only every so many calls of ``update_factors`` are counted (10, as published; 1 takes all).
        positions: output positions sampled per image for the input factor; None takes all.
        generator: of the sampled positions.
    """

    def __init__(self, model: nn.Module, damping: float = 1e-3, update_freq: int = 10,
                 positions: int | None = None, generator: torch.Generator | None = None):
        if damping <= 0 or update_freq < 1:
            raise UserError(f"damping must be > 0 and update_freq >= 1; seen: {damping}, {update_freq}")
        self.model, self.damping, self.update_freq = model, damping, update_freq
        self.positions, self.generator = positions, generator or torch.Generator().manual_seed(0)
        self.layers = {name: layer for name, layer in model.named_modules()
                       if isinstance(layer, (nn.Conv2d, nn.Linear))}
        self.factors: dict[str, Factors] = {}
        self._inputs: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        self._slopes: dict[str, Tensor] = {}
        self._hooks: list = []
        self._calls = 0

    def register_hooks(self) -> None:
        """Registers forward hooks that keep inputs, and tensor hooks that keep output gradients."""
        self.remove_hooks()
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._keep(name)))

    def remove_hooks(self) -> None:
        """Removes all hooks and cached tensors."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._inputs, self._gradients = [], {}, {}

    @contextmanager
    def watching(self, norms: Norms) -> Iterator[None]:
        """``register_hooks()`` inside the ``with`` block, ``remove_hooks()`` after it; ``norms`` are folded."""
        self._slopes = {name: slope(norm).view(-1, 1, 1) for name, norm in norms.items()}
        self.register_hooks()
        try:
            yield
        finally:
            self.remove_hooks()
            self._slopes = {}

    def _keep(self, name: str):
        def forward(_layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[name] = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            own = gradient.detach()
            self._gradients[name] = own * self._slopes[name] if name in self._slopes else own
        return forward

    @torch.no_grad()
    def update_factors(self) -> None:
        """Adds the last batch's inputs and output gradients to the factors.

        Raises:
            UserError: no backward pass has been seen since the hooks were registered.
        """
        self._calls += 1
        if (self._calls - 1) % self.update_freq == 0:
            if not self._gradients:
                raise UserError("no gradients captured: call register_hooks(), then forward and loss.backward(), "
                                "then update_factors()")
            for name, gradient in self._gradients.items():
                self._add(name, self.layers[name], self._inputs[name], gradient)
        self._inputs, self._gradients = {}, {}

    collect = update_factors  # as a watcher

    def _add(self, name: str, layer: nn.Module, x: Tensor, gradient: Tensor) -> None:
        where = sampled_positions(layer, x, self.positions, self.generator)
        rows, scale = patches(layer, x.float(), where)
        groups = getattr(layer, "groups", 1)
        slopes = gradient.float().flatten(2) if gradient.dim() == 4 else gradient.float()[:, :, None]
        count, outputs, total = slopes.shape
        slopes = slopes.view(count, groups, outputs // groups, total).permute(1, 2, 0, 3).flatten(2)
        a, g = scale * rows.mT @ rows, slopes @ slopes.mT / total
        kept = self.factors.setdefault(name, Factors(torch.zeros_like(a), torch.zeros_like(g)))
        kept.a += a
        kept.g += g
        kept.images += count

    def input_factor(self, layer_name: str) -> Tensor:
        """A = E[sum_t a a^T], float32 [groups, d + 1, d + 1]; the last row and column belong to the constant 1."""
        return self._of(layer_name).a / self._of(layer_name).images

    def output_factor(self, layer_name: str) -> Tensor:
        """G = E[(1/T) sum_t g g^T], float32 [groups, outputs per group, outputs per group]."""
        return self._of(layer_name).g / self._of(layer_name).images

    def stored(self) -> dict[str, Tensor]:
        """Factors of all layers on the CPU, as ``<layer>/a`` and ``<layer>/g``."""
        return {f"{name}/{part}": value.cpu() for name in self.factors
                for part, value in (("a", self.input_factor(name)), ("g", self.output_factor(name)))}

    def inverse(self, layer_name: str) -> tuple[Tensor, Tensor]:
        """Damped inverses of both factors of a layer (without the constant's row and column)."""
        a, g = self.input_factor(layer_name)[:, :-1, :-1], self.output_factor(layer_name)
        return tuple(torch.linalg.inv(damped(factor, self.damping)) for factor in (a, g))

    def compute_fisher_diagonal(self, layer_name: str) -> Tensor:
        """Diagonal of the Kronecker-factored Fisher of a layer's weight, in the weight's shape.

        Raises:
            UserError: the layer is unknown, or no batch has been seen.
        """
        a, g = self.input_factor(layer_name)[:, :-1, :-1], self.output_factor(layer_name)
        diagonal = g.diagonal(dim1=1, dim2=2)[:, :, None] * a.diagonal(dim1=1, dim2=2)[:, None, :]
        return diagonal.reshape(self.layers[layer_name].weight.shape)

    def _of(self, layer_name: str) -> Factors:
        if layer_name not in self.factors:
            known = ", ".join(list(self.factors)[:8]) or "none yet: run forward, backward and update_factors()"
            raise UserError(f"no factors for layer '{layer_name}'. Layers with factors: {known}")
        return self.factors[layer_name]


def damped(factor: Tensor, damping: float) -> Tensor:
    """``factor`` [..., d, d] plus ``damping`` times its mean diagonal on the diagonal."""
    level = factor.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(factor.dtype).tiny)
    return factor + damping * level[..., None, None] * torch.eye(factor.shape[-1], device=factor.device,
                                                                dtype=factor.dtype)

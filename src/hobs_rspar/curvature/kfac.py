"""Kronecker factors of the Fisher of convolutions and linear layers (KFC: Grosse & Martens 2016), by hooks.

For a layer z = W a with output gradients g at T positions per image:

    A = E[sum_t a a^T],   G = E[(1/T) sum_t g g^T],   Fisher of W ~ A (x) G

with g of each image's own loss and labels drawn from the network. Each patch ``a`` ends in a constant 1, so that A
also holds the mean input (last column / A[-1, -1]) and the number of positions (A[-1, -1] = T). In a sweep, sums grow
during the backward pass, where a layer's input and gradient are at hand: nothing is kept until its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hobs_rspar.admission import check_visible
from hobs_rspar.curvature.factors import Factors, accumulate, column_blocks, fisher_diagonal, input_diagonal
from hobs_rspar.curvature.layout import Pass, by_image, channel_axis, per_image
from hobs_rspar.curvature.passes import products
from hobs_rspar.curvature.patches import (
    output_rows,
    output_size,
    patches,
    positions_of,
    reproduces,
    sampled_positions,
)
from hobs_rspar.errors import UserError
from hobs_rspar.folding import Norms, slope

__all__ = ["Factors", "KFACHessianApproximator", "Wanted", "damped", "fisher_diagonal", "input_diagonal",
           "output_rows", "output_size", "patches", "reproduces", "sampled_positions"]

ROWS_BYTES = 2**26  # of patches that are gathered at once


@dataclass(frozen=True)
class Wanted:
    """Which factors are wanted.

    Attributes:
        layers: their names, each with the number of the channel that each of its inputs belongs to [inputs], so that
            a channel is never divided among blocks of A; None: every input is a channel of its own.
        whole: all of G, or its diagonal alone.
    """

    layers: Mapping[str, Tensor | None]
    whole: bool = False


@dataclass(frozen=True)
class Seen:
    """A layer's input in a forward pass of so many images; its version tells whether it is still the same."""

    x: Tensor
    version: int
    images: int
    gradient: Tensor | None = None


class KFACHessianApproximator:
    """K-FAC factors of convolutions (strided, dilated, grouped, depthwise) and linear layers (maps and tokens, too).

    Usage: ``register_hooks()``; then for every batch forward, ``backward()`` of the *summed* loss, and
    ``update_factors()``. It is also a watcher of :func:`hobs_rspar.curvature.passes.sweep`.

    Args:
        model: hooks are added by ``register_hooks`` and removed by ``remove_hooks``.
        damping: added to the factors' diagonals by ``inverse``, relative to their mean diagonal.
        update_freq: only every so many batches are counted (10, as published; 1 takes all).
        positions: output positions sampled per image for the input factor; None takes all.
        generator: of the sampled positions.
        wanted: which factors; None: both whole factors of all layers.

    Attributes:
        layers: by name, those that factors are wanted of.
        opaque: layers without factors, since their patches do not give their output: name -> why.
    """

    def __init__(self, model: nn.Module, damping: float = 1e-3, update_freq: int = 10,
                 positions: int | None = None, generator: torch.Generator | None = None,
                 wanted: Wanted | None = None):
        check_visible(model)
        if damping <= 0 or update_freq < 1:
            raise UserError(f"damping must be > 0 and update_freq >= 1; seen: {damping}, {update_freq}")
        self.model, self.damping, self.update_freq = model, damping, update_freq
        self.positions, self.generator = positions, generator or torch.Generator().manual_seed(0)
        self.wanted = wanted or Wanted({name: None for name, layer in model.named_modules()
                                        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear))}, True)
        self.layers = {name: model.get_submodule(name) for name in self.wanted.layers}
        self.opaque: dict[str, str] = {}
        self.factors: dict[str, Factors] = {}
        self._checked: set[str] = set()
        self._slopes: dict[str, Tensor] = {}
        self._hooks: list = []
        self._pass, self._calls, self._streams = Pass(), 0, False
        self._waiting: dict[str, Seen] = {}

    def register_hooks(self) -> None:
        """Registers forward hooks that look at inputs, and tensor hooks that add to the factors."""
        self.remove_hooks()
        self._hooks.append(self._pass.watch(self.model))
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._watch(name)))

    def remove_hooks(self) -> None:
        """Removes all hooks."""
        for handle in self._hooks:
            handle.remove()
        self._hooks, self._waiting = [], {}

    @contextmanager
    def watching(self, norms: Norms) -> Iterator[None]:
        """``register_hooks()`` inside the ``with`` block, ``remove_hooks()`` after it; ``norms`` are folded."""
        self._slopes, self._streams = {name: slope(norm) for name, norm in norms.items()}, True
        self.register_hooks()
        try:
            yield
        finally:
            self.remove_hooks()
            self._slopes, self._streams = {}, False

    def _watch(self, name: str):
        def forward(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._calls % self.update_freq or not output.requires_grad:
                return
            x = inputs[0].detach()
            if not self._plain(name, layer, x):
                return
            seen = Seen(x, x._version, self._pass.images)
            output.register_hook(lambda gradient: self._take(name, seen, gradient.detach()))
        return forward

    @torch.no_grad()
    def _plain(self, name: str, layer: nn.Module, x: Tensor) -> bool:
        """Whether the layer's patches give its output, by one image of its first batch."""
        if name not in self._checked:
            self._checked.add(name)
            shared = len(x) % max(1, self._pass.images)
            why = "it works on a table that all images share" if shared else \
                reproduces(layer, x[:1], type(layer).forward(layer, x[:1]))  # the class's own: norms may be folded
            if why:
                self.opaque[name] = why
        return name not in self.opaque

    def collect(self) -> None:
        """Called by a sweep after each batch, whose factors have grown on the way."""
        self._calls += 1

    def update_factors(self) -> None:
        """Adds the last batch's inputs and output gradients to the factors.

        Raises:
            UserError: no backward pass has been seen since the hooks were registered.
        """
        self._calls += 1
        if (self._calls - 1) % self.update_freq == 0:
            if not self._waiting and not self.opaque:
                raise UserError("no gradients captured: call register_hooks(), then forward and loss.backward(), "
                                "then update_factors()")
            for name, seen in self._waiting.items():
                self._add(name, seen, seen.gradient)
        self._waiting = {}

    def _take(self, name: str, seen: Seen, gradient: Tensor) -> None:
        if self._streams:
            self._add(name, seen, gradient)
        else:
            self._waiting[name] = replace(seen, gradient=gradient)

    @torch.no_grad()
    def _add(self, name: str, seen: Seen, gradient: Tensor) -> None:
        x, images, layer = seen.x, seen.images, self.layers[name]
        if x._version != seen.version:
            raise UserError(f"the input of '{name}' is changed in place after '{name}' has read it; write that "
                            "operation out of place (inplace=False)")
        if name not in self.factors:
            self.factors[name] = self._empty(name, layer, gradient)
        kept = self.factors[name]
        where = sampled_positions(layer, x, self.positions, self.generator, images)
        for part in _shares(layer, x, where, images):
            rows, scale = patches(layer, part.float(), where, len(part) * images // len(x))
            accumulate(kept, rows, scale)
        kept.g += self._outer(name, layer, gradient, images)
        kept.images += images

    def _outer(self, name: str, layer: nn.Module, gradient: Tensor, images: int) -> Tensor:
        """Sum over images of (1/T) sum_t g g^T: the whole of it, or its diagonal."""
        own = self._slopes.get(name)
        if not self.wanted.whole:
            g = by_image(layer, gradient, images).float()
            axis = channel_axis(layer)
            sums = products(g, g, axis).sum(0) / (g[0].numel() // g.shape[axis])
            return sums if own is None else sums * own.square()
        slopes = per_image(layer, gradient, images).float()
        slopes = slopes if own is None else slopes * own[:, None]
        groups = getattr(layer, "groups", 1)
        count, outputs, total = slopes.shape
        slopes = slopes.view(count, groups, outputs // groups, total).permute(1, 2, 0, 3).flatten(2)
        return slopes @ slopes.mT / total

    def _empty(self, name: str, layer: nn.Module, gradient: Tensor) -> Factors:
        columns, groups = column_blocks(layer, self.wanted.layers[name]), getattr(layer, "groups", 1)
        blocks, size = (1, layer.weight[0].numel()) if columns is None else columns.shape
        outputs = gradient.shape[channel_axis(layer)]
        g = (groups, outputs // groups, outputs // groups) if self.wanted.whole else (outputs,)
        zeros = gradient.new_zeros((), dtype=torch.float32)
        return Factors(zeros.new_zeros(groups * blocks, size + 1, size + 1), zeros.new_zeros(g), columns)

    def input_factor(self, layer_name: str) -> Tensor:
        """A = E[sum_t a a^T], float32 [groups, d + 1, d + 1]; the last row and column belong to the constant 1.

        Of a layer with more than ``WHOLE`` columns: blocks of its diagonal, [groups * blocks, b + 1, b + 1].
        """
        return self._of(layer_name).a / self._of(layer_name).images

    def output_factor(self, layer_name: str) -> Tensor:
        """G = E[(1/T) sum_t g g^T], float32 [groups, outputs per group, outputs per group]; or its diagonal."""
        return self._of(layer_name).g / self._of(layer_name).images

    def stored(self, release: bool = False) -> dict[str, Tensor]:
        """Factors on the CPU.

        Args:
            release: forget the sums, layer by layer, so that no more than one is in memory twice.

        Returns:
            ``<layer>/a``, ``<layer>/g`` (``<layer>/fisher`` where only G's diagonal was wanted), and
            ``<layer>/columns`` where A is in blocks.
        """
        found = {}
        for name in list(self.factors):
            kept = self.factors[name]
            found[f"{name}/a"] = self.input_factor(name).cpu()
            found[f"{name}/{'g' if self.wanted.whole else 'fisher'}"] = self.output_factor(name).cpu()
            if kept.columns is not None:
                found[f"{name}/columns"] = kept.columns
            if release:
                del self.factors[name]
        return found

    def inverse(self, layer_name: str) -> tuple[Tensor, Tensor]:
        """Damped inverses of both factors of a layer (without the constant's row and column)."""
        a, g = self.input_factor(layer_name)[:, :-1, :-1], self.output_factor(layer_name)
        return tuple(torch.linalg.inv(damped(factor, self.damping)) for factor in (a, g))

    def compute_fisher_diagonal(self, layer_name: str) -> Tensor:
        """Diagonal of the Kronecker-factored Fisher of a layer's weight, in the weight's shape.

        Raises:
            UserError: the layer is unknown, or no batch has been seen.
        """
        self._of(layer_name)
        factors, layer = self.stored(), self.layers[layer_name]
        a, g = input_diagonal(factors, layer_name, layer)[:, :-1], fisher_diagonal(factors, layer_name)
        return (g.view(len(a), -1, 1) * a[:, None, :]).reshape(layer.weight.shape).to(layer.weight.device)

    def _of(self, layer_name: str) -> Factors:
        if layer_name in self.opaque:
            raise UserError(f"no factors for layer '{layer_name}': {self.opaque[layer_name]}")
        if layer_name not in self.factors:
            known = ", ".join(list(self.factors)[:8]) or "none yet: run forward, backward and update_factors()"
            raise UserError(f"no factors for layer '{layer_name}'. Layers with factors: {known}")
        return self.factors[layer_name]


def _shares(layer: nn.Module, x: Tensor, where: Tensor | None, images: int) -> tuple[Tensor, ...]:
    """An input in parts of whole images whose patches take at most ``ROWS_BYTES`` each."""
    taken = positions_of(layer, x, images) if where is None else len(where)
    size = max(1, ROWS_BYTES // (4 * taken * (layer.weight[0].numel() + 1) * getattr(layer, "groups", 1)))
    return x.split(size * len(x) // images)


def damped(factor: Tensor, damping: float) -> Tensor:
    """``factor`` [..., d, d] plus ``damping`` times its mean diagonal on the diagonal."""
    diagonal = (regular := factor.clone()).diagonal(dim1=-2, dim2=-1)
    diagonal += damping * diagonal.mean(-1, keepdim=True).clamp_min(torch.finfo(factor.dtype).tiny)
    return regular

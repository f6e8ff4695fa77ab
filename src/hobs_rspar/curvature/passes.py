"""The sweep over calibration images from which all sensitivities are read: one forward and one backward pass.

Gradients are taken with respect to activations only: weights are frozen, the backward pass ends at the outputs of the
first convolutions, and batch norms are folded. That is two thirds of the arithmetic of a training step. Watchers read
what they need on the way, by hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.folding import Norms, folded
from hobs_rspar.data import Images

BLOCK = 2**18  # elements of a product that stays in a CPU's cache until it is summed


class Watcher(Protocol):
    """Reads something off a sweep."""

    def watching(self, norms: Norms) -> AbstractContextManager:
        """Holds the watcher's hooks on the network, in which ``norms`` are :func:`folded`."""

    def collect(self) -> None:
        """Called after each batch's backward pass, that of its *summed* cross entropy."""


def sweep(network: nn.Module, images: Images, batch_size: int, watchers: Sequence[Watcher],
          generator: torch.Generator | None = None, progress=lambda batches: batches) -> Tensor:
    """Passes all images through a network, forward and backward.

    Args:
        network: in evaluation mode; untouched once the sweep has ended.
        images: calibration images [N].
        batch_size: images a pass.
        watchers: who listens.
        generator: draws labels from the network's own prediction: second moments of gradients are then the Fisher.
            None takes the images' labels: then they are the *empirical* Fisher.
        progress: wraps the iteration over batches.

    Returns:
        The labels that were used [N].
    """
    used = []
    with ExitStack() as stack:
        stack.enter_context(_gradients_of_activations(network))
        norms = stack.enter_context(folded(network, images.normalised(images.pixels[:1])))
        for watcher in watchers:
            stack.enter_context(watcher.watching(norms))
        for _, (x, labels) in zip(progress(range(0, len(images), batch_size)), images.batches(batch_size)):
            with torch.enable_grad():
                out = network(x)
                used.append(labels if generator is None else sampled_labels(out, generator))
                F.cross_entropy(out, used[-1], reduction="sum").backward()
            for watcher in watchers:
                watcher.collect()
    return torch.cat(used)


def sampled_labels(out: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [n] drawn from softmax(out): what makes a second moment of gradients the Fisher."""
    return torch.multinomial(out.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(out.device)


def products(x: Tensor, y: Tensor) -> Tensor:
    """Sum of x * y over the positions of every image and channel: [N, C] of [N, C] or [N, C, H, W]."""
    if x.dim() == 2:
        return x * y
    if x.device.type != "cpu":
        return (x * y).sum((2, 3))
    size = max(1, BLOCK // x[0].numel())
    buffer = torch.empty_like(x[:size])
    return torch.cat([torch.mul(a, b, out=buffer[:len(a)]).sum((2, 3)) for a, b in zip(x.split(size), y.split(size))])


@contextmanager
def _gradients_of_activations(network: nn.Module) -> Iterator[None]:
    """Freezes the parameters; gradients begin at the outputs of the first layers with weights."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    start = torch.zeros((), requires_grad=True)

    def begin(_layer: nn.Module, _inputs, out: Tensor) -> Tensor:
        return out if out.requires_grad else _Begin.apply(out, start)

    hooks = [layer.register_forward_hook(begin, prepend=True) for layer in network.modules()
             if isinstance(layer, (nn.Conv2d, nn.Linear))]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class _Begin(torch.autograd.Function):
    """Makes a tensor that needs no gradient one that does, without a copy; its own inputs still need none."""

    @staticmethod
    def forward(ctx, out: Tensor, _start: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx, _gradient: Tensor) -> tuple[None, None]:
        return None, None

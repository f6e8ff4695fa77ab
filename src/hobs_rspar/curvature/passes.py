"""The one sweep over calibration images from which all sensitivities are read: a forward pass, a backward per labels.

Gradients are taken with respect to activations only. Weights are frozen, the backward pass ends at the outputs of the
first convolutions, and batch norms are the affine maps that they are in evaluation mode: at most two thirds of the
arithmetic of a training step for one kind of labels, all of it for both. Watchers read what they need on the way, by
hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.data import Images

TRUE, SAMPLED = "true", "sampled"  # the images' own labels; labels drawn from the network's prediction


class Watcher(Protocol):
    """Reads something off the passes of one kind of labels.

    Attributes:
        listening: whether the backward pass that runs is one of that kind; set by :func:`sweep`.
    """

    listening: bool

    def watching(self) -> AbstractContextManager:
        """Holds the watcher's hooks on the network."""

    def collect(self) -> None:
        """Called after each backward pass listened to."""


def sweep(network: nn.Module, images: Images, batch_size: int, watchers: Mapping[str, Sequence[Watcher]],
          generator: torch.Generator | None = None, progress=lambda batches: batches) -> None:
    """Passes all images through a network, once forward and once backward for every kind of labels.

    Args:
        network: in evaluation mode; untouched once the sweep has ended.
        images: calibration images.
        batch_size: images a pass.
        watchers: kind of labels -> who listens to its backward passes, each that of the batch's *summed* cross entropy.
            With ``SAMPLED`` labels second moments of gradients are the Fisher, with ``TRUE`` the empirical Fisher.
        generator: of the sampled labels.
        progress: wraps the iteration over batches.
    """
    with ExitStack() as stack:
        stack.enter_context(_gradients_of_activations(network))
        for watcher in (watcher for listeners in watchers.values() for watcher in listeners):
            watcher.listening = False
            stack.enter_context(watcher.watching())
        for _, (x, labels) in zip(progress(range(0, len(images), batch_size)), images.batches(batch_size)):
            with torch.enable_grad():
                out = network(x)
                losses = [F.cross_entropy(out, labels if kind == TRUE else sampled_labels(out, generator),
                                          reduction="sum") for kind in watchers]
            for number, (loss, listeners) in enumerate(zip(losses, watchers.values()), 1):
                _backward(loss, listeners, keep=number < len(losses))


def _backward(loss: Tensor, listeners: Sequence[Watcher], keep: bool) -> None:
    for watcher in listeners:
        watcher.listening = True
    loss.backward(retain_graph=keep)
    for watcher in listeners:
        watcher.collect()
        watcher.listening = False


def sampled_labels(out: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [n] drawn from softmax(out): what makes a second moment of gradients the Fisher."""
    return torch.multinomial(out.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(out.device)


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
    norms = [norm for norm in network.modules()
             if type(norm) is nn.BatchNorm2d and norm.track_running_stats and not norm.training]
    for norm in norms:
        norm.forward = _affine(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
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


def _affine(norm: nn.BatchNorm2d):
    """The forward of a batch norm whose statistics are fixed, with a backward that is one product."""
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return lambda x: _Affine.apply(x, norm, scale)


class _Affine(torch.autograd.Function):
    """Batch norm in evaluation mode; PyTorch's own backward sums over all pixels for weights that are frozen here."""

    @staticmethod
    def forward(ctx, x: Tensor, norm: nn.BatchNorm2d, scale: Tensor) -> Tensor:
        ctx.scale = scale
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.scale.view(1, -1, 1, 1), None, None

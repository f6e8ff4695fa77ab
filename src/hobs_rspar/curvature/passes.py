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

from hobs_rspar.curvature.layout import LAYERS
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.folding import Norms, folded

BLOCK = 2**18  # elements of a product that stays in a CPU's cache until it is summed
BYTES = 2**29  # of what a pass keeps for its backward pass; fewer images a pass where they would keep more


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
        batch_size: images a pass, fewer where a pass would keep more than ``BYTES`` of activations.
        watchers: who listens.
        generator: draws labels from the network's own prediction: second moments of gradients are then the Fisher.
            None takes the images' labels: then they are the *empirical* Fisher.
        progress: wraps the iteration over batches.

    Returns:
        The labels that were used [N].

    Raises:
        UserError: outputs are not finite, labels are not classes of the network, or it cannot be differentiated.
    """
    used = []
    with ExitStack() as stack:
        stack.enter_context(_gradients_of_activations(network))
        example = images.normalised(images.pixels[:1])
        norms = stack.enter_context(folded(network, example))
        batch_size = affordable(network, example, min(batch_size, len(images)))
        for watcher in watchers:
            stack.enter_context(watcher.watching(norms))
        for _, (x, labels) in zip(progress(range(0, len(images), batch_size)), images.batches(batch_size)):
            with torch.enable_grad():
                used.append(_both_ways(network, x, labels, generator))
            for watcher in watchers:
                watcher.collect()
    return torch.cat(used)


def _both_ways(network: nn.Module, x: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
    """One batch forward and backward; the labels that were used [n]."""
    out = network(x)
    if not out.isfinite().all():
        raise UserError(f"{type(network).__name__} gives outputs that are not finite (nan or inf) for calibration "
                        "images; check its weights, and that the images are normalised as in its training")
    if generator is not None:
        labels = sampled_labels(out, generator)
    elif not 0 <= int(labels.min()) <= int(labels.max()) < out.shape[1]:
        raise UserError(f"labels go from {int(labels.min())} to {int(labels.max())}, but {type(network).__name__} has "
                        f"{out.shape[1]} outputs; labels must be within 0 to {out.shape[1] - 1}")
    loss = F.cross_entropy(out, labels, reduction="sum")
    try:
        loss.backward()
    except RuntimeError as problem:
        if "inplace operation" not in str(problem) and "does not require grad" not in str(problem):
            raise
        raise UserError(f"{type(network).__name__} cannot be differentiated, so it has no curvature: "
                        f"{str(problem).splitlines()[0]} Write in-place operations on what other layers still need out "
                        "of place (inplace=False), and do not detach activations") from problem
    return labels


def affordable(network: nn.Module, example: Tensor, most: int) -> int:
    """Images a pass, at most ``most``, of which a forward pass with gradients keeps no more than ``BYTES``.

    Args:
        network: as it is going to be passed; it runs on one and on two images.
        example: one image [1, C, H, W].
        most: images.
    """
    if most < 2:
        return most
    each = _kept(network, torch.cat([example, example])) - _kept(network, example)
    return max(1, min(most, BYTES // max(1, each)))


def _kept(network: nn.Module, x: Tensor) -> int:
    """Bytes of all tensors that autograd saves in a forward pass."""
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = network(x)
    del out  # until here the graph holds what was counted, so that no address stands for two tensors
    return sum(seen.values())


def sampled_labels(out: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [n] drawn from softmax(out): what makes a second moment of gradients the Fisher."""
    return torch.multinomial(out.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(out.device)


def products(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Sum of x * y over the positions of every image and channel.

    Args:
        x: [N, C], [N, C, H, W], [N, ..., C]: images first.
        y: likewise.
        axis: of the channels, counted from the end.

    Returns:
        [N, C].
    """
    if x.dim() == 2:
        return x * y
    positions = [dimension for dimension in range(1, x.dim()) if dimension != x.dim() + axis]
    if x.device.type != "cpu":
        return (x * y).sum(positions)
    size = max(1, BLOCK // x[0].numel())
    buffer = torch.empty_like(x[:size])
    return torch.cat([torch.mul(a, b, out=buffer[:len(a)]).sum(positions)
                      for a, b in zip(x.split(size), y.split(size))])


@contextmanager
def _gradients_of_activations(network: nn.Module) -> Iterator[None]:
    """Freezes the parameters; gradients begin at the outputs of the first layers with weights."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    start = torch.zeros((), requires_grad=True)

    def begin(_layer: nn.Module, _inputs, out: Tensor) -> Tensor:
        if out.requires_grad or not torch.is_grad_enabled():
            return out
        return _Begin.apply(out.clone() if out._is_view() else out, start)  # a view may not be marked

    hooks = [layer.register_forward_hook(begin, prepend=True) for layer in network.modules()
             if isinstance(layer, LAYERS)]
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

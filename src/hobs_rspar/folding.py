"""Batch norms folded into the convolutions before them: the same function in evaluation mode, with less to move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Norms = Mapping[str, nn.BatchNorm2d]  # convolution -> the batch norm that alone reads its output


def slope(norm: nn.BatchNorm2d) -> Tensor:
    """What the batch norm multiplies each channel by [C]."""
    scale = (norm.running_var + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.detach()


@contextmanager
def folded(network: nn.Module, x: Tensor) -> Iterator[Norms]:
    """Inside the ``with`` block convolutions give what their batch norms would; those pass it on.

    Args:
        network: in evaluation mode; its parameters stay as they are.
        x: one image [1, C, H, W], to see which batch norm follows which convolution.

    Yields:
        The folded batch norms. Where a gradient with respect to the output of one of these convolutions is seen, it is
        that of the batch norm's output: times :func:`slope` it is that of the convolution's own.
    """
    norms = following_norms(network, x)
    for name, norm in norms.items():
        network.get_submodule(name).forward = _convolution(network.get_submodule(name), norm)
        norm.forward = lambda x: x
    try:
        yield norms
    finally:
        for name, norm in norms.items():
            del network.get_submodule(name).forward, norm.forward


@torch.no_grad()
def fused(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that does what both layers do."""
    scale = slope(norm)
    bias = (0 if layer.bias is None else layer.bias) - norm.running_mean
    bias = bias * scale if norm.bias is None else bias * scale + norm.bias
    return layer.weight * scale.view(-1, 1, 1, 1), bias


def _convolution(layer: nn.Conv2d, norm: nn.BatchNorm2d):
    weight, bias = fused(layer, norm)
    return lambda x: layer._conv_forward(x, weight, bias)


def following_norms(network: nn.Module, x: Tensor) -> Norms:
    """Batch norms in evaluation mode that read the output of a convolution which nothing else reads.

    Args:
        network: untouched.
        x: one image [1, C, H, W].
    """
    outputs: dict[str, list[_Seen]] = {}
    readers: dict[nn.BatchNorm2d, list[_Seen]] = {}
    hooks = [layer.register_forward_hook(lambda _m, _i, out, name=name: outputs.setdefault(name, []).append(_Seen(out)))
             for name, layer in network.named_modules() if type(layer) is nn.Conv2d]
    hooks += [norm.register_forward_pre_hook(lambda norm, inputs: readers.setdefault(norm, []).append(_Seen(inputs[0])))
              for norm in network.modules() if type(norm) is nn.BatchNorm2d and norm.track_running_stats
              and not norm.training]
    try:
        with torch.enable_grad():
            out = network(x.detach().requires_grad_().clone())  # a leaf may not be changed in place
    finally:
        for handle in hooks:
            handle.remove()
    reads = _reads(getattr(out, "grad_fn", None))
    return {name: norm for name, seen in outputs.items() for norm, inputs in readers.items()
            if len(seen) == len(inputs) == 1 and seen[0].same(inputs[0]) and reads.get(seen[0].node) == 1}


class _Seen:
    """A tensor as it was when it was seen: an activation may have changed it in place until it is seen again."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.node, self.version = tensor, tensor.grad_fn, tensor._version

    def same(self, other: _Seen) -> bool:
        return self.tensor is other.tensor and self.version == other.version


def _reads(end) -> dict:
    """How often the output of each node of an autograd graph is read."""
    if end is None:
        return {}
    counts, waiting = {end: 1}, [end]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node not in counts:
                waiting.append(node)
            counts[node] = counts.get(node, 0) + 1
    return counts

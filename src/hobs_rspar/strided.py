"""Strided 1x1 convolutions without oneDNN's faulty weight gradient.

On CPUs, oneDNN writes past its workspace in the weight gradient of a strided 1x1 convolution in float32 and
channels_last that has fewer inputs than a vector has places, 8 with AVX2 and 16 with AVX-512 (its issue 6035): wrong
gradients, or a crash. Pruned shortcuts are such layers. To take every stride-th pixel first, and to convolve without a
stride, is the same function by another kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn import functional as F


@contextmanager
def sliced(network: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, strided 1x1 convolutions of a network on a CPU take their pixels first."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and concerned(layer)]
    for layer in layers:
        layer._conv_forward = _slicing(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer._conv_forward


def concerned(layer: nn.Conv2d) -> bool:
    """Whether a layer takes single pixels, and not all of them."""
    plain = layer.kernel_size == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return plain and layer.stride != (1, 1) and layer.weight.device.type == "cpu"


def _slicing(layer: nn.Conv2d):
    down, right = layer.stride

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x[:, :, ::down, ::right], weight, bias)

    return forward

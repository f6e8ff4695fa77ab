"""Multiply-accumulates (MACs) and parameters: one counter for dense and pruned networks alike.

Counted are convolutions and linear layers, without biases, norms and activations (about 1 % of a CNN's total).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

COUNTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Cost:
    """MACs of one image, and parameters of the whole network."""

    macs: int
    params: int


def layer_macs(network: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one image in every convolution and linear layer, in order of execution.

    Args:
        network: any network; untouched.
        example: input [1, C, H, W].

    Returns:
        Layer name -> MACs. A layer that is called twice counts twice.
    """
    macs: dict[str, int] = {}

    def count_macs(name: str, layer: nn.Module, output: Tensor) -> None:
        macs[name] = macs.get(name, 0) + layer.weight[0].numel() * output.numel() // example.shape[0]

    _watch(network, example, count_macs)
    return macs


def layer_calls(network: nn.Module, example: Tensor) -> dict[str, int]:
    """How often every convolution and linear layer is called in one forward pass."""
    calls: dict[str, int] = {}

    def count_call(name: str, _layer: nn.Module, _output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1

    _watch(network, example, count_call)
    return calls


@torch.no_grad()
def _watch(network: nn.Module, example: Tensor, see: Callable[[str, nn.Module, Tensor], None]) -> None:
    """One forward pass in evaluation mode; ``see`` gets name, layer and output of every call of a counted layer."""
    hooks = [layer.register_forward_hook(lambda layer, _inputs, output, name=name: see(name, layer, output))
             for name, layer in network.named_modules() if isinstance(layer, COUNTED)]
    training = [module for module in network.modules() if module.training]
    try:
        network.eval()(example)
    finally:
        for module in training:  # one by one: a frozen batch norm of a training network stays frozen
            module.training = True
        for handle in hooks:
            handle.remove()


def count(network: nn.Module, example: Tensor) -> Cost:
    """MACs of one image and the number of parameters of ``network``."""
    return Cost(sum(layer_macs(network, example).values()), sum(p.numel() for p in network.parameters()))

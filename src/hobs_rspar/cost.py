"""Multiply-accumulates (MACs) and parameters: one counter for dense and pruned networks alike.

Counted are convolutions and linear layers, without biases, norms and activations (about 1 % of a CNN's total).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

COUNTED = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Cost:
    """MACs of one image, and parameters of the whole network."""

    macs: int
    params: int


@torch.no_grad()
def layer_macs(network: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one image in every convolution and linear layer, in order of execution.

    Args:
        network: any network; its training mode is restored.
        example: input [1, C, H, W].

    Returns:
        Layer name -> MACs. A layer that is called twice counts twice.
    """
    macs: dict[str, int] = {}

    def hook(name: str):
        def count(layer: nn.Module, _inputs, output: Tensor) -> None:
            per_output = layer.weight[0].numel()
            macs[name] = macs.get(name, 0) + per_output * output.numel() // example.shape[0]
        return count

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in network.named_modules()
             if isinstance(layer, COUNTED)]
    training = network.training
    try:
        network.eval()(example)
    finally:
        network.train(training)
        for handle in hooks:
            handle.remove()
    return macs


def count(network: nn.Module, example: Tensor) -> Cost:
    """MACs of one image and the number of parameters of ``network``."""
    return Cost(sum(layer_macs(network, example).values()), sum(p.numel() for p in network.parameters()))

"""Multiply-accumulates (MACs) and parameters: one counter for dense and pruned networks alike.

Counted is what PyTorch's own ``FlopCounterMode`` counts, by its formulas: convolutions of every kind, linear layers,
products of matrices and attention; not biases, norms and activations (about 1 % of a CNN's total).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
OTHERS = "(products of activations)"  # in place of a layer's name


@dataclass(frozen=True)
class Cost:
    """MACs of one image, and parameters of the whole network."""

    macs: int
    params: int


class Counter(TorchDispatchMode):
    """Counts MACs while it is active, by the layer that is running.

    Attributes:
        layer: name of the layer that is running, or ``OTHERS``.
        macs: layer -> MACs, in order of execution.
    """

    def __init__(self):
        super().__init__()
        self.layer, self.macs = OTHERS, {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True imports the compiler, seconds of every process

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, formula = kwargs or {}, flop_registry.get(func.overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:  # what is made of other operations is counted by those
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.macs[self.layer] = self.macs.get(self.layer, 0) + formula(*args, **kwargs, out_val=out) // 2
        return out

    def running(self, name: str) -> None:
        self.layer = name


def layer_macs(network: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs of one image in every layer, in order of execution; ``OTHERS`` for products of activations.

    Args:
        network: any network; untouched.
        example: input [n, C, H, W].

    Returns:
        Layer name -> MACs. A layer that is called twice counts twice.
    """
    return {name: macs // len(example) for name, macs in _counted(network, example).macs.items()}


def _counted(network: nn.Module, example: Tensor) -> Counter:
    counter, hooks = Counter(), []
    for name, layer in network.named_modules():
        if isinstance(layer, LAYERS):
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: counter.running(name)))
            hooks.append(layer.register_forward_hook(lambda *_: counter.running(OTHERS), always_call=True))
    try:
        with evaluation(network), without_fast_paths(), torch.no_grad(), counter:
            network(example)
    finally:
        for handle in hooks:
            handle.remove()
    return counter


@contextmanager
def evaluation(network: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block all modules are in evaluation mode; afterwards each is as it was."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:  # one by one: a frozen batch norm of a training network stays frozen
            module.training = True


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Inside the ``with`` block attention runs operation by operation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def count(network: nn.Module, example: Tensor) -> Cost:
    """MACs of one image and the number of parameters of ``network``."""
    return Cost(sum(layer_macs(network, example).values()), sum(p.numel() for p in network.parameters()))

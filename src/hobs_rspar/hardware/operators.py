"""Where a forward pass spends its time: every operator, timed as PyTorch calls it, against what the machine can do.

The roofline (Williams et al., Communications of the ACM 2009): an operator that does I multiply-accumulates per byte
moved cannot be faster than min(peak arithmetic, I x peak bandwidth).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hobs_rspar.hardware.physics import peak_macs

COPY = 32 * 2**20  # float32 numbers of the copy that shows the bandwidth: more than caches hold
KINDS = {"conv": "convolution", "batch_norm": "batch norm", "relu": "activation", "hardtanh": "activation",
         "silu": "activation", "sigmoid": "activation", "mm": "linear", "add": "addition", "mul": "multiplication",
         "mean": "pooling", "pool": "pooling", "pad": "padding", "cat": "concatenation"}  # part of PyTorch's name: kind


@dataclass(frozen=True)
class Call:
    """One operator of one forward pass.

    Attributes:
        layer: name of the innermost module that calls it.
        kind: what it is, such as ``convolution``.
        macs: multiply-accumulates; 0 where it is no convolution or matrix product.
        bytes: of the tensors that it reads and writes, weights included.
        shape: of its output.
        milliseconds: median over rounds.
    """

    layer: str
    kind: str
    macs: int
    bytes: int
    shape: tuple[int, ...]
    milliseconds: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine was seen to do: multiply-accumulates/s of a large product, bytes/s of a large copy."""

    macs: float
    bytes: float

    @classmethod
    def measured(cls, device: torch.device, trials: int = 5) -> Ceilings:
        source = torch.rand(COPY, device=device)
        target = torch.empty_like(source)
        seconds = []
        for _ in range(trials + 1):  # the first one brings the memory in
            start = _now(device)
            target.copy_(source)
            seconds.append(_now(device) - start)
        return cls(peak_macs(device), 2 * source.numel() * source.element_size() / min(seconds[1:]))


class _Watch(TorchDispatchMode):
    """Times every operator and notes what it does; ``layer`` is set by the modules' hooks."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.layer, self.calls = device, [""], []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every process that times imports the compiler, 1.4 s

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        start = _now(self.device)
        out = operator(*args, **(kwargs or {}))
        seconds = _now(self.device) - start
        if not operator.is_view and isinstance(out, (Tensor, tuple)):
            first = out if isinstance(out, Tensor) else out[0]
            moved = sum(part.numel() * part.element_size() for part in tree_leaves((args, out))
                        if isinstance(part, Tensor))
            name = operator._schema.name.removeprefix("aten::")
            self.calls.append(Call(self.layer[-1], kind(name), _macs(name, args, first), moved, tuple(first.shape),
                                   1e3 * seconds))
        return out


def profile(networks: list[nn.Module], x: Tensor, rounds: int = 20) -> list[list[Call]]:
    """The operators of every network in order of execution; networks take turns, so that drift hits all alike.

    Args:
        networks: prepared as for timing, in evaluation mode.
        x: input [batch, ...] on their device.
        rounds: timed passes of each; one more before them warms up.
    """
    every: list[list[list[Call]]] = [[] for _ in networks]
    for _ in range(rounds + 1):
        for network, seen in zip(networks, every, strict=True):
            seen.append(_pass(network, x))
    return [[_median(calls) for calls in zip(*seen[1:], strict=True)] for seen in every]


def kind(operator: str) -> str:
    """The kind of an operator of PyTorch, such as ``linear`` of ``addmm``; its own name where there is none."""
    return next((name for part, name in KINDS.items() if part in operator), operator)


def _pass(network: nn.Module, x: Tensor) -> list[Call]:
    with torch.inference_mode(), _Watch(x.device) as watch, _named(network, watch.layer):
        network(x)
    return watch.calls


@contextmanager
def _named(network: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keeps the name of the module that runs at the end of ``stack``."""
    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: _drop(stack)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop(stack: list[str]) -> None:
    """Returns nothing: what a forward hook returns takes the place of the module's output."""
    stack.pop()


def _macs(operator: str, args: tuple, out: Tensor) -> int:
    """Of a layer, whose second argument is its weight, or of a matrix product."""
    if operator == "linear" or kind(operator) == "convolution":
        return out.numel() * args[1][0].numel()
    return out.numel() * args[-1].shape[0] if kind(operator) == "linear" else 0


def _median(calls: tuple[Call, ...]) -> Call:
    first = calls[0]
    return Call(first.layer, first.kind, first.macs, first.bytes, first.shape,
                float(np.median([call.milliseconds for call in calls])))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

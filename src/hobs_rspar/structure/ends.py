"""Where channels end: operations that lose them, and those that no rule knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hobs_rspar.structure.trace import Trace


def unknown(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """An operation without a rule: channels end here, and stay."""
    name = func.overloadpacket.__name__
    lost(trace, tensors_in((*args, *kwargs.values())), out, f"{trace.where} uses the operation '{name}'")


def nothing(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Numbers of its own in place of those that were there."""


def lost(trace: Trace, tensors: list[Tensor], out, reason: str) -> None:
    for tensor in tensors:
        trace.pin(tensor, reason)
    for piece in [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []:
        if isinstance(piece, Tensor):
            trace.put(piece, None)


def tensors_in(values) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found

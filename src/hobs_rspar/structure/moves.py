"""Operations that only move elements: they are carried out on labels, too; what is padded has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hobs_rspar.structure import labels
from hobs_rspar.structure.ends import tensors_in, unknown
from hobs_rspar.structure.labels import ANY, NONE, Part

if TYPE_CHECKING:
    from hobs_rspar.structure.trace import Trace


INDEXED = "gather index index_select".split()  # the other tensors say which elements


def move(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """What only moves elements moves their labels; several tensors are joined."""
    moving = args[:1] if func.overloadpacket.__name__ in INDEXED else args
    tensors = [t for t in tensors_in(moving) if trace.get(t) is not None]
    if not tensors:
        return
    parts = [trace.get(t) for t in tensors]
    if len(tensors) == 1 and isinstance(parts[0], Part):
        moved = {axis: _moved(func, args, kwargs, {tensors[0]: index}) for axis, index in parts[0].coordinates.items()}
        if isinstance(out, Tensor):
            trace.put(out, Part(parts[0].name, moved))
        else:
            for i, piece in enumerate(out):
                trace.put(piece, Part(parts[0].name, {axis: pieces[i] for axis, pieces in moved.items()}))
        return
    given = {t: _as_labels(trace, t, tensors) for t in tensors}
    moved = _moved(func, args, kwargs, given)
    for piece, found in zip([out] if isinstance(out, Tensor) else out, [moved] if isinstance(out, Tensor) else moved):
        trace.put(piece, found)


def _moved(func, args: tuple, kwargs: dict, given: dict[Tensor, Tensor]):
    """The operation on labels in place of tensors; what it pads with, and what has no labels, becomes -1."""
    name, first = func.overloadpacket.__name__, next(iter(given.values()))
    if name in ("view", "_unsafe_view", "_reshape_copy"):
        return first.reshape(args[1])
    if name in ("clone", "_to_copy"):
        return first if 0 in first.stride() else first.clone()
    by_identity = {id(t): found for t, found in given.items()}
    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    if func.is_view:  # views of labels are views, too: what is copied into one is seen in the other
        return func(*_swapped(args, lambda t: by_identity.get(id(t), t)), **kwargs)
    def shifted(tensor: Tensor) -> Tensor:  # by 1, so that padding by zeros gives -1; some moves are for doubles only
        if id(tensor) in by_identity:
            return by_identity[id(tensor)].double() + 1
        return torch.zeros(tensor.shape, dtype=torch.double) if tensor.dtype.is_floating_point else tensor.cpu()

    moved = func(*_swapped(args, shifted), **kwargs)
    return [piece.long() - 1 for piece in moved] if isinstance(moved, (list, tuple)) else moved.long() - 1


def _swapped(value, change: Callable[[Tensor], Tensor]):
    """Arguments with other tensors."""
    if isinstance(value, (list, tuple)):
        return type(value)(_swapped(one, change) for one in value)
    return change(value) if isinstance(value, Tensor) else value


def _as_labels(trace: Trace, tensor: Tensor, beside: list[Tensor]) -> Tensor:
    """Labels of a tensor; those of a parameter lie along the dimension along which the labels beside it change."""
    found = trace.get(tensor)
    if isinstance(found, Tensor):
        return found
    dims = {dim for other in beside if isinstance(trace.get(other), Tensor) for dim in labels.varying(trace.get(other))}
    for axis, index in found.coordinates.items():
        if set(labels.varying(index)) <= dims:
            return trace.nodes(found, axis)
    return torch.full(tensor.shape, NONE)


def restride(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor) -> None:
    """Another layout in memory for the same elements; anything else is not followed."""
    if tuple(args[1]) != tuple(args[0].shape):
        unknown(trace, func, args, kwargs, out)


def copy(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Writes into a tensor, or into a view of one, whose labels are views, too."""
    into, source = trace.labels(args[0]), trace.labels(args[1])
    if source is None and into is None:
        return
    if into is None or (into < 0).any() and 0 in into.stride():
        return trace.pin(args[1], f"{trace.where} copies it into a part of another tensor")
    given = torch.full(into.shape, NONE) if source is None else source.expand(into.shape)
    trace.channels.unite(*labels.compact(into, given))
    lost = into[(into >= 0) & (given < 0)]
    trace.channels.pin(lost, f"{trace.where} overwrites a part of it")
    if 0 not in into.stride():
        into.copy_(torch.where(into < 0, given, into))


def made(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """A new tensor, which others may be copied into; one like an activation has its channels."""
    like = trace.labels(args[0]) if args and func.overloadpacket.__name__.endswith("_like") else None
    trace.put(out, torch.full(out.shape, NONE) if like is None else like.contiguous())


def noise(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor) -> None:
    """Random numbers (dropout), of as many channels as are there."""
    trace.put(out, torch.full(out.shape, ANY))

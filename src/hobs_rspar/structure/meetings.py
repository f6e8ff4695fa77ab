"""Operations in which elements meet: element by element, within a map, over positions or over channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hobs_rspar.structure import labels
from hobs_rspar.structure.ends import tensors_in
from hobs_rspar.structure.labels import ANY, NONE, Part

if TYPE_CHECKING:
    from hobs_rspar.structure.trace import Trace


def elementwise(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Unites the channels that meet; a number, or what is spread over the channels, changes nothing."""
    if isinstance(out, (tuple, list)):
        out = out[0]
    tensors = [t for t in tensors_in((*args, *kwargs.values())) if t.dim() > 0 and t.numel() > 1]
    if func.overloadpacket.__name__ == "glu":
        tensors = _halves(trace, args)
    known = [trace.get(t) for t in tensors]
    acted = [found for found in known if isinstance(found, Tensor)]
    if not acted:
        return trace.put(out, _joined(trace, [(t, found) for t, found in zip(tensors, known) if found], out.shape))
    merged = acted[0].expand(out.shape)
    for found in acted[1:]:
        merged = _merged(trace, merged, found.expand(out.shape))
    for tensor, found in zip(tensors, known):
        met(trace, merged, tensor, found)
    trace.put(out, merged)


def _joined(trace: Trace, parts: list[tuple[Tensor, Part]], shape: torch.Size) -> Part | None:
    """A tensor computed from parameters alone: it goes with the first of its shape, and the others' axes with those."""
    first = next((part for tensor, part in parts if tensor.shape == shape), None)
    for _, other in parts if first else ():
        for axis, index in first.coordinates.items():
            for own, place in other.coordinates.items():
                if torch.equal(*labels.compact(index.expand(shape), place.expand(shape))):
                    trace.channels.unite(*labels.compact(trace.nodes(first, axis).expand(shape),
                                                         trace.nodes(other, own).expand(shape)))
    return first


def _halves(trace: Trace, args: tuple) -> list[Tensor]:
    dim = args[1] if len(args) > 1 else -1
    halves, found = args[0].chunk(2, dim), trace.labels(args[0])
    if found is not None:
        for half, own in zip(halves, found.chunk(2, dim)):
            trace.put(half, own)
    return list(halves)


def _merged(trace: Trace, one: Tensor, other: Tensor) -> Tensor:
    a, b = labels.compact(one, other)
    trace.channels.unite(a, b)
    return torch.where(a >= 0, a, b).expand(one.shape)


def met(trace: Trace, merged: Tensor, tensor: Tensor, found: Tensor | Part | None) -> None:
    """What an operand that may lack some of the channels does to the others' ones."""
    shape = [1] * (merged.dim() - tensor.dim()) + list(tensor.shape)
    dims = [dim for dim in labels.varying(merged) if shape[dim] > 1]
    if not dims:
        return  # the same for all channels
    if isinstance(found, Part):
        return _bind(trace, merged, found)
    ones, own = labels.compact(merged, torch.full_like(merged, NONE) if found is None else found.expand(merged.shape))
    met = torch.isin(ones, ones[(own >= 0) | (own == ANY)])
    if (~met & (ones >= 0)).any():
        trace.channels.pin(ones[~met], f"{trace.where} combines it with a tensor that has no such channels "
                                       "(padding, an input, a constant)")


def _bind(trace: Trace, merged: Tensor, part: Part) -> None:
    """Unites channels with the axis of a parameter along which they lie: an index for a channel, or several."""
    for axis, index in part.coordinates.items():
        ones, places = torch.broadcast_tensors(*labels.compact(merged, index.expand(merged.shape)))
        if len(part.coordinates) == 1 or _one_to_one(ones[ones >= 0], places[ones >= 0]):
            nodes = trace.channels.nodes(part.name, axis, trace.sizes[part.name][axis])
            return trace.channels.unite(ones, nodes[places])
    trace.channels.pin(labels.compact(merged)[0], f"{trace.where} combines it with {part.name}, of which no axis goes "
                                                  "with the channels")


def _one_to_one(ones: Tensor, places: Tensor) -> bool:
    """Whether every label has one place only, or every place one label."""
    pairs = torch.unique(torch.stack([ones, places]), dim=1)
    return pairs.shape[1] in (len(ones.unique()), len(places.unique()))


def spatial(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Pooling and resizing [N, C, ...]: every channel by itself; what lies in one channel belongs together."""
    found = [one for one in map(trace.labels, tensors_in(args)) if one is not None]
    for piece in [out] if isinstance(out, Tensor) else out:
        if found and isinstance(piece, Tensor):
            trace.put(piece, labels.along(together(trace, found[0], 1), 1, piece.shape))


def together(trace: Trace, found: Tensor, dim: int, nodes: Tensor | None = None) -> Tensor:
    """Unites all labels at one place of a dimension, and with ``nodes`` [length] there; one label for each [length]."""
    rows = labels.rows(found, dim)
    first = rows.amax(1)
    trace.channels.unite(rows, first[:, None])
    if nodes is not None:
        trace.channels.unite(first, nodes)
    return first


def reduce(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """A reduction over positions leaves channels as they are; one over channels pins them."""
    found = trace.labels(args[0])
    if found is None:
        return
    name = func.overloadpacket.__name__
    dims = _dims(name, args, kwargs, found.dim())
    small = labels.compact(found)[0]
    low, high = labels.spread(small, dims)
    mixed = low != high
    if mixed.any():
        trace.channels.pin(small[mixed.expand_as(small)], f"{trace.where} takes the {name} over channels")
    left = torch.where(mixed, NONE, high).expand([1 if dim in dims else size for dim, size in enumerate(found.shape)])
    for piece in [out] if isinstance(out, Tensor) else out:
        if piece.shape == found.shape:
            trace.put(piece, torch.where(mixed, NONE, high).expand(found.shape))
        else:
            trace.put(piece, left.reshape(piece.shape))


def _dims(name: str, args: tuple, kwargs: dict, count: int) -> list[int]:
    place = 2 if name in ("norm", "linalg_vector_norm") else 1
    dims = kwargs.get("dim", args[place] if len(args) > place else None)
    if isinstance(dims, bool) or dims is None or dims == []:
        return list(range(count))
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


def softmax(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Positions compete within a channel; where channels compete, they are pinned."""
    found = trace.labels(args[0])
    if found is not None:
        if args[1] % found.dim() in labels.varying(found):
            trace.pin(args[0], f"{trace.where} takes the softmax over channels")
        trace.put(out, found)

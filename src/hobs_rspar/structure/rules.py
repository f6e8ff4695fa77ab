"""What each operation of PyTorch does to channels: the rules of the trace, by the name of the aten operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hobs_rspar.structure import labels
from hobs_rspar.structure.labels import ANY, NONE, Part

if TYPE_CHECKING:
    from hobs_rspar.structure.trace import Trace

Rule = Callable[["Trace", Callable, tuple, dict, object], None]


@dataclass(frozen=True)
class Use:
    """How a layer multiplies by its weight.

    Attributes:
        outputs: axis of the weight, or None where it has only one output.
        inputs: likewise.
        groups: of a convolution.
        depthwise: every output channel reads one input channel.
    """

    outputs: int | None
    inputs: int | None
    groups: int = 1
    depthwise: bool = False


MOVES = """cat channel_shuffle clone constant_pad_nd flip gather
index index_select lift_fresh native_channel_shuffle pixel_shuffle pixel_unshuffle repeat roll rot90 stack
im2col reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
_reshape_copy _to_copy _unsafe_view select_copy slice_copy split_copy split_with_sizes_copy unbind_copy""".split()
INDEXED = "gather index index_select".split()  # the other tensors say which elements
ELEMENTWISE = "_prelu_kernel hardswish glu masked_fill where lerp addcmul addcdiv native_dropout".split()
SPATIAL = """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d max_unpool2d max_unpool3d fractional_max_pool2d
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa grid_sampler_2d""".split()
REDUCTIONS = """mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all
median nanmedian argmax argmin cumsum cumprod""".split()
MADE = """empty new_empty empty_like zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full
empty_strided new_empty_strided""".split()
NOISE = "bernoulli uniform normal exponential rand rand_like randn randn_like".split()
FILLS = "fill zero".split()  # in place


def rule_of(func) -> Rule:
    """The rule of an aten operation."""
    plain = func.overloadpacket.__name__.rstrip("_")
    if plain in RULES and func._overloadname != "other":  # max(a, b) is no reduction
        return RULES[plain]
    if func.is_view:
        return move
    return elementwise if torch.Tag.pointwise in func.tags else unknown


def move(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """What only moves elements moves their labels; several tensors are joined."""
    moving = args[:1] if func.overloadpacket.__name__ in INDEXED else args
    tensors = [t for t in _tensors(moving) if trace.get(t) is not None]
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


def elementwise(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Unites the channels that meet; a number, or what is spread over the channels, changes nothing."""
    if isinstance(out, (tuple, list)):
        out = out[0]
    tensors = [t for t in _tensors((*args, *kwargs.values())) if t.dim() > 0 and t.numel() > 1]
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
        _met(trace, merged, tensor, found)
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


def _met(trace: Trace, merged: Tensor, tensor: Tensor, found: Tensor | Part | None) -> None:
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
    found = [one for one in map(trace.labels, _tensors(args)) if one is not None]
    for piece in [out] if isinstance(out, Tensor) else out:
        if found and isinstance(piece, Tensor):
            trace.put(piece, labels.along(_together(trace, found[0], 1), 1, piece.shape))


def _together(trace: Trace, found: Tensor, dim: int, nodes: Tensor | None = None) -> Tensor:
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


def convolution(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor) -> None:
    """A convolution: its inputs end, its outputs begin."""
    x, weight, bias, *_, transposed, _, groups = args[:9]
    part = trace.get(weight)
    if not isinstance(part, Part):
        return unknown(trace, func, args, kwargs, out)
    depthwise = groups > 1 and x.shape[1] == groups and weight.shape[1] == 1
    axes = _axes(part, weight, (1, 0) if transposed and not depthwise else (0, 1))
    if axes is None:
        return _lost(trace, [x], out, f"{trace.where} convolves with a part of {part.name}")
    use = Use(*axes, groups, depthwise)
    trace.used(part.name, use)
    inputs = _channel_nodes(trace, part, axes[1], use, x.shape[1])
    outputs = _channel_nodes(trace, part, axes[0], use, out.shape[1])
    if depthwise:
        inputs = outputs.view(groups, -1)[:, 0]
        trace.channels.unite(outputs.view(groups, -1), inputs[:, None])
    found = trace.labels(x)
    if found is not None:
        _together(trace, found, 1, inputs)
    _layer_output(trace, bias, outputs, 1, out)


def _axes(part: Part, weight: Tensor, dims: tuple[int, int]) -> tuple[int | None, int | None] | None:
    """Which axes of a parameter are the outputs and the inputs, given their dimensions in the weight that is used."""
    found: list[int | None] = []
    for dim in dims:
        if weight.shape[dim] == 1:
            found.append(None)
            continue
        own = [axis for axis, index in part.coordinates.items() if labels.varying(index) == [dim]]
        if len(own) != 1:
            return None
        found.append(own[0])
    return found[0], found[1]


def _channel_nodes(trace: Trace, part: Part, axis: int | None, use: Use, count: int) -> Tensor:
    """Nodes of a convolution's input or output channels [count]; in groups, those at the same place go together."""
    if axis is None:
        return torch.full((count,), NONE)
    nodes = trace.channels.nodes(part.name, axis, trace.sizes[part.name][axis])
    if use.groups > 1 and not use.depthwise and len(nodes) == count:
        trace.channels.unite(nodes.view(use.groups, -1), nodes.view(use.groups, -1)[:1])
    return nodes.repeat(count // len(nodes))  # the weight of a grouped convolution has the inputs of one group


def _layer_output(trace: Trace, bias: Tensor | None, nodes: Tensor, dim: int, out: Tensor) -> None:
    found = trace.get(bias)
    if isinstance(found, Part) and 0 in found.coordinates:
        trace.channels.unite(trace.nodes(found, 0), nodes)
    trace.put(out, labels.along(nodes, dim, out.shape))


def addmm(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor) -> None:
    matmul(trace, func, args[1:], kwargs, out, args[0])


def matmul(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor, bias: Tensor | None = None) -> None:
    """[.., n, k] x [.., k, m]: a layer where one side is a weight, else a product of activations."""
    left, right = args[:2]
    if isinstance(trace.get(right), Part) and not isinstance(trace.get(left), Part):
        return _linear(trace, left, right, bias, (-1, -2), out)
    if isinstance(trace.get(left), Part) and not isinstance(trace.get(right), Part):
        return _linear(trace, right, left, bias, (-2, -1), out)
    product(trace, func, args, kwargs, out)


def _linear(trace: Trace, x: Tensor, weight: Tensor, bias, dims: tuple[int, int], out: Tensor) -> None:
    part = trace.get(weight)
    axes = _axes(part, weight, tuple(dim % weight.dim() for dim in dims))
    if axes is None:
        return _lost(trace, [x], out, f"{trace.where} multiplies by a part of {part.name}")
    trace.used(part.name, Use(*axes))
    outputs, inputs = (torch.full((size,), NONE) if axis is None else _along(trace, part, axis, dim % weight.dim())
                       for axis, dim, size in zip(axes, dims, (weight.shape[dims[0]], weight.shape[dims[1]])))
    found = trace.labels(x)
    if found is not None:
        _together(trace, found, dims[0] % x.dim(), inputs)
    _layer_output(trace, bias, outputs, dims[0] % out.dim(), out)


def _along(trace: Trace, part: Part, axis: int, dim: int) -> Tensor:
    """Nodes of a parameter's axis along the one dimension of a weight along which it changes."""
    return labels.rows(trace.nodes(part, axis), dim)[:, 0]


def product(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Products of activations (attention): channels are summed over, or the cost is one that no layer has."""
    _lost(trace, _tensors(args[:3]), out, f"{trace.where} multiplies activations with activations (attention)")


def batch_norm(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Batch norm [N, C, ...] and its vectors [C], which are parameters, buffers or missing."""
    found = trace.labels(args[0])
    if found is None:
        return
    first = _together(trace, found, 1)
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            _met(trace, first, tensor, trace.get(tensor))
            if isinstance(trace.get(tensor), Tensor):
                trace.channels.unite(first, trace.labels(tensor))
    trace.put(out[0], labels.along(first, 1, out[0].shape))


def group_norm(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """The channels of a norm group share their statistics: they go together, whole groups at a time."""
    x, weight, bias = args[:3]
    found, count = trace.labels(x), args[6]
    if found is None:
        return
    first = _together(trace, found, 1)
    trace.channels.unite(first.view(count, -1), first.view(count, -1)[:, :1])
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor):
            _met(trace, first, tensor, trace.get(tensor))
    trace.put(out[0], labels.along(first, 1, out[0].shape))


def layer_norm(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Statistics over the last dimensions; with a weight they can be those of the channels that stay."""
    x, shape, weight, bias = args[:4]
    found = trace.labels(x)
    if found is None:
        return
    dims = [dim for dim in labels.varying(found) if dim >= found.dim() - len(shape)]
    if dims and weight is None:
        trace.pin(x, f"{trace.where} takes statistics over channels, without a weight that says which")
    for tensor in (weight, bias):
        if dims and isinstance(tensor, Tensor):
            _met(trace, found, tensor, trace.get(tensor))
    trace.put(out[0], found)


def nothing(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Numbers of its own in place of those that were there."""


def unknown(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """An operation without a rule: channels end here, and stay."""
    name = func.overloadpacket.__name__
    _lost(trace, _tensors((*args, *kwargs.values())), out, f"{trace.where} uses the operation '{name}'")


def _lost(trace: Trace, tensors: list[Tensor], out, reason: str) -> None:
    for tensor in tensors:
        trace.pin(tensor, reason)
    for piece in [out] if isinstance(out, Tensor) else out if isinstance(out, (tuple, list)) else []:
        if isinstance(piece, Tensor):
            trace.put(piece, None)


def _tensors(values) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, move), **dict.fromkeys(ELEMENTWISE, elementwise), **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(REDUCTIONS, reduce), **dict.fromkeys(MADE, made), **dict.fromkeys(FILLS, nothing),
    **dict.fromkeys(NOISE, noise),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), softmax),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), convolution),
    **dict.fromkeys(("mm", "bmm"), matmul), "addmm": addmm, "baddbmm": addmm, "copy": copy, "as_strided": restride,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm", "_batch_norm_with_update"), batch_norm),
    "native_group_norm": group_norm, "native_layer_norm": layer_norm,
    **{f"_scaled_dot_product_{kind}": product for kind in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable")},
}

"""Operations with weights, where channels end and others begin, and norms, which go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hobs_rspar.structure import labels
from hobs_rspar.structure.ends import lost, tensors_in, unknown
from hobs_rspar.structure.labels import NONE, Part
from hobs_rspar.structure.meetings import met, together

if TYPE_CHECKING:
    from hobs_rspar.structure.trace import Trace


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


def convolution(trace: Trace, func, args: tuple, kwargs: dict, out: Tensor) -> None:
    """A convolution: its inputs end, its outputs begin."""
    x, weight, bias, *_, transposed, _, groups = args[:9]
    part = trace.get(weight)
    if not isinstance(part, Part):
        return unknown(trace, func, args, kwargs, out)
    depthwise = groups > 1 and x.shape[1] == groups and weight.shape[1] == 1
    axes = _axes(part, weight, (1, 0) if transposed and not depthwise else (0, 1))
    if axes is None:
        return lost(trace, [x], out, f"{trace.where} convolves with a part of {part.name}")
    use = Use(*axes, groups, depthwise)
    trace.used(part.name, use)
    inputs = _channel_nodes(trace, part, axes[1], use, x.shape[1])
    outputs = _channel_nodes(trace, part, axes[0], use, out.shape[1])
    if depthwise:
        inputs = outputs.view(groups, -1)[:, 0]
        trace.channels.unite(outputs.view(groups, -1), inputs[:, None])
    found = trace.labels(x)
    if found is not None:
        together(trace, found, 1, inputs)
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
        return lost(trace, [x], out, f"{trace.where} multiplies by a part of {part.name}")
    trace.used(part.name, Use(*axes))
    outputs, inputs = (torch.full((size,), NONE) if axis is None else _along(trace, part, axis, dim % weight.dim())
                       for axis, dim, size in zip(axes, dims, (weight.shape[dims[0]], weight.shape[dims[1]])))
    found = trace.labels(x)
    if found is not None:
        together(trace, found, dims[0] % x.dim(), inputs)
    _layer_output(trace, bias, outputs, dims[0] % out.dim(), out)


def _along(trace: Trace, part: Part, axis: int, dim: int) -> Tensor:
    """Nodes of a parameter's axis along the one dimension of a weight along which it changes."""
    return labels.rows(trace.nodes(part, axis), dim)[:, 0]


def product(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Products of activations (attention): channels are summed over, or the cost is one that no layer has."""
    lost(trace, tensors_in(args[:3]), out, f"{trace.where} multiplies activations with activations (attention)")


def batch_norm(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """Batch norm [N, C, ...] and its vectors [C], which are parameters, buffers or missing."""
    found = trace.labels(args[0])
    if found is None:
        return
    first = together(trace, found, 1)
    for tensor in args[1:5]:
        if isinstance(tensor, Tensor):
            met(trace, first, tensor, trace.get(tensor))
            if isinstance(trace.get(tensor), Tensor):
                trace.channels.unite(first, trace.labels(tensor))
    trace.put(out[0], labels.along(first, 1, out[0].shape))


def group_norm(trace: Trace, func, args: tuple, kwargs: dict, out) -> None:
    """The channels of a norm group share their statistics: they go together, whole groups at a time."""
    x, weight, bias = args[:3]
    found, count = trace.labels(x), args[6]
    if found is None:
        return
    first = together(trace, found, 1)
    trace.channels.unite(first.view(count, -1), first.view(count, -1)[:, :1])
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor):
            met(trace, first, tensor, trace.get(tensor))
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
            met(trace, found, tensor, trace.get(tensor))
    trace.put(out[0], found)

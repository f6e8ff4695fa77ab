"""A table of layer latencies over widths: what a layer would cost with fewer input and output channels."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar.cost import COUNTED
from hobs_rspar.errors import UserError
from hobs_rspar.hardware.timing import clock_for, example, prepared

STEPS = 8  # widths are eighths of the dense width
WARMUP = 3  # untimed calls of each shape


@dataclass(frozen=True)
class Layer:
    """Latencies of one layer.

    Attributes:
        inputs: widths of the input, rising.
        outputs: widths of the output, rising.
        milliseconds: median at [input, output].
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]


class LatencyTable:
    """Latencies of the layers of one network on one platform, interpolated between the measured widths.

    The sum over layers leaves out norms, activations and additions.

    Args:
        layers: by name.
        batch_size: images per call.
        platform: slug of the platform.
    """

    def __init__(self, layers: dict[str, Layer], batch_size: int, platform: str):
        self.layers, self.batch_size, self.platform = layers, batch_size, platform

    def layer_ms(self, name: str, in_channels: int, out_channels: int) -> float:
        """Latency of a layer in ms, bilinear between the four nearest measured widths.

        Raises:
            UserError: the layer is not in the table, or a width is outside it.
        """
        if name not in self.layers:
            raise UserError(f"latency table: layer '{name}' is not in it. It has: {', '.join(self.layers)}")
        layer = self.layers[name]
        row, down = _place(layer.inputs, in_channels, f"{name}: input channels")
        column, right = _place(layer.outputs, out_channels, f"{name}: output channels")
        ms = np.array(layer.milliseconds)[row:row + 2, column:column + 2]
        return float(np.array([1 - down, down])[:len(ms)] @ ms @ np.array([1 - right, right])[:ms.shape[1]])

    def predict(self, widths: dict[str, tuple[int, int]]) -> float:
        """Sum over layers in ms.

        Args:
            widths: layer name -> (input channels, output channels).
        """
        return sum(self.layer_ms(name, *channels) for name, channels in widths.items())

    def dense_ms(self) -> float:
        """Sum over all layers at their dense widths in ms."""
        return self.predict({name: (layer.inputs[-1], layer.outputs[-1]) for name, layer in self.layers.items()})

    def to_json(self) -> dict:
        layers = {name: {"in": list(layer.inputs), "out": list(layer.outputs),
                         "ms": [list(row) for row in layer.milliseconds]} for name, layer in self.layers.items()}
        return {"measured": True, "platform": self.platform, "batch_size": self.batch_size, "layers": layers}

    @classmethod
    def from_json(cls, record: dict) -> LatencyTable:
        """The table that :meth:`to_json` wrote.

        Raises:
            UserError: nothing was measured.
        """
        if not record["measured"]:
            raise UserError("latency.json: nothing was measured, because the study's budget is MACs; set "
                            "study.budget.latency_ms or latency_ratio and run 'dvc repro latency'")
        layers = {name: Layer(tuple(entry["in"]), tuple(entry["out"]), tuple(map(tuple, entry["ms"])))
                  for name, entry in record["layers"].items()}
        return cls(layers, record["batch_size"], record["platform"])


def measure_table(network: nn.Module, image: Tensor, batch_size: int, rounds: int, platform: str) -> LatencyTable:
    """Times every convolution and linear layer of ``network`` alone, at eighths of its widths.

    Layers of the same shape share one measurement.

    Args:
        network: dense, on the device to measure.
        image: one input [1, C, H, W] on the same device.
        batch_size: images per call.
        rounds: timed calls per width; their median counts.
        platform: slug of the platform.
    """
    known: dict[tuple, Layer] = {}
    layers = {}
    for name, (layer, shape) in _inputs(network, image).items():
        key = (repr(layer), shape)
        if key not in known:
            known[key] = _measure_layer(layer, (batch_size, *shape), image.device, rounds)
        layers[name] = known[key]
    return LatencyTable(layers, batch_size, platform)


def _inputs(network: nn.Module, image: Tensor) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Layer name -> (layer, shape of its input without the batch), in order of execution."""
    seen: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}

    def hook(name: str):
        return lambda layer, inputs: seen.setdefault(name, (layer, tuple(inputs[0].shape[1:]))) and None

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in network.named_modules()
             if isinstance(layer, COUNTED)]
    try:
        with torch.inference_mode():
            network(image)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _measure_layer(layer: nn.Module, shape: tuple[int, ...], device: torch.device, rounds: int) -> Layer:
    groups, outs = getattr(layer, "groups", 1), layer.weight.shape[0]
    ins = layer.weight.shape[1] * groups
    inputs, outputs = _widths(ins, ins // groups if groups > 1 else 1), _widths(outs, 1)
    if groups > 1:  # whole groups go, so the output follows the input
        rows = [(_time(layer, width, width * outs // ins, shape, device, rounds),) * len(outputs) for width in inputs]
    else:
        rows = [tuple(_time(layer, width, out, shape, device, rounds) for out in outputs) for width in inputs]
    return Layer(inputs, outputs, tuple(rows))


def _widths(channels: int, multiple: int) -> tuple[int, ...]:
    """Eighths of ``channels`` in whole multiples, rising, without doubles."""
    steps = (max(1, round(channels * step / STEPS / multiple)) * multiple for step in range(1, STEPS + 1))
    return tuple(sorted(set(steps)))


def _time(layer: nn.Module, ins: int, outs: int, shape: tuple[int, ...], device: torch.device, rounds: int) -> float:
    """Median ms of ``layer`` with other widths; its input is ``shape`` [batch, channels, ...] likewise."""
    resized = prepared(_resized(layer, ins, outs), device)
    x, clock = example((shape[0], ins, *shape[2:]), device), clock_for(device)
    with torch.inference_mode():
        clock.lap(lambda: resized(x), WARMUP)
        return float(f"{np.median(clock.lap(lambda: resized(x), rounds)):.6g}")


def _resized(layer: nn.Module, ins: int, outs: int) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return nn.Linear(ins, outs, bias)
    groups = layer.groups if layer.groups == 1 else ins // layer.weight.shape[1]
    return nn.Conv2d(ins, outs, layer.kernel_size, layer.stride, layer.padding, layer.dilation, groups, bias)


def _place(widths: tuple[int, ...], width: int, what: str) -> tuple[int, float]:
    """Index of the measured width at or below ``width``, and how far it is on the way to the next one (0 to 1).

    Below the smallest measured width its latency counts: there, the fixed time of a call is what is left.
    """
    if not 1 <= width <= widths[-1]:
        raise UserError(f"latency table: {what} = {width} is not in 1 to {widths[-1]}")
    if width <= widths[0]:
        return 0, 0.0
    below = min(bisect.bisect_right(widths, width), len(widths) - 1) - 1
    return below, (width - widths[below]) / (widths[below + 1] - widths[below])

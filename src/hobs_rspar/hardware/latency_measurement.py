"""Times the layers of a network over their widths, and whole networks of random widths."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar import checkpoint
from hobs_rspar.cost import LAYERS, TRANSPOSED
from hobs_rspar.coupling import Groups
from hobs_rspar.hardware.latency_table import LatencyTable, Layer, Whole
from hobs_rspar.hardware.timing import clock_for, example, prepared

STEPS = 8  # widths are eighths of the dense width
WARMUP = 3  # untimed calls of each shape
WHOLES = 16  # networks that are timed as a whole: the dense one, and others down to NARROWEST of its widths
NARROWEST, SPREAD = 0.2, 0.3  # and the standard deviation of the groups' log ratios around a network's own


def measure_table(network: nn.Module, groups: Groups, image: Tensor, batch_size: int, rounds: int,
                  platform: str) -> LatencyTable:
    """Times every convolution and linear layer of ``network`` alone, at eighths of its widths, and whole networks.

    Layers of the same shape share one measurement.

    Args:
        network: dense, on the device to measure.
        groups: of the network.
        image: one input [1, C, H, W] on the same device.
        batch_size: images per call.
        rounds: timed calls per width; their median counts.
        platform: slug of the platform.
    """
    known: dict[tuple, Layer] = {}
    layers = {}
    for name, (layer, shape, positions) in _calls(network, image).items():
        key = (repr(layer), shape)
        if key not in known:
            batch = (batch_size * shape[0], *shape[1:])
            known[key] = _measure_layer(layer, batch, positions * batch_size, image.device, rounds)
        layers[name] = known[key]
    return LatencyTable(layers, batch_size, platform, _wholes(network, groups, image, batch_size, rounds))


def _calls(network: nn.Module, image: Tensor) -> dict[str, tuple[nn.Module, tuple[int, ...], int]]:
    """Layer name -> (layer, shape of its input for one image, positions of its output), in order of execution."""
    seen: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {}

    def hook(name: str):
        return lambda layer, inputs, output: seen.setdefault(
            name, (layer, tuple(inputs[0].shape), output.numel() // _channels(layer)[1])) and None

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in network.named_modules()
             if isinstance(layer, LAYERS)]
    try:
        with torch.inference_mode():
            network(image)
    finally:
        for handle in hooks:
            handle.remove()
    return seen


def _channels(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _measure_layer(layer: nn.Module, shape: tuple[int, ...], elements: int, device: torch.device, rounds: int) -> Layer:
    groups, (ins, outs) = getattr(layer, "groups", 1), _channels(layer)
    if _depthwise(layer):  # the output follows the input
        widths = _widths(ins, 1)
        row = tuple(_time(layer, width, width * outs // ins, shape, device, rounds) for width in widths)
        return Layer((ins,), tuple(width * outs // ins for width in widths), (row,), elements)
    inputs, outputs = _widths(ins, groups), _widths(outs, groups)
    rows = tuple(tuple(_time(layer, width, out, shape, device, rounds) for out in outputs) for width in inputs)
    return Layer(inputs, outputs, rows, elements)


def _depthwise(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Linear) and layer.groups == layer.in_channels > 1


def _widths(channels: int, multiple: int) -> tuple[int, ...]:
    """Eighths of ``channels`` in whole multiples, rising, without doubles."""
    steps = (max(1, round(channels * step / STEPS / multiple)) * multiple for step in range(1, STEPS + 1))
    return tuple(sorted(set(steps)))


def _time(layer: nn.Module, ins: int, outs: int, shape: tuple[int, ...], device: torch.device, rounds: int) -> float:
    """Median ms of ``layer`` with other widths; its input is ``shape`` likewise."""
    resized = prepared(_resized(layer, ins, outs), device)
    wanted = (*shape[:-1], ins) if isinstance(layer, nn.Linear) else (shape[0], ins, *shape[2:])
    x, clock = example(wanted, device), clock_for(device)
    with torch.inference_mode():
        clock.lap(lambda: resized(x), WARMUP)
        return _rounded(np.median(clock.lap(lambda: resized(x), rounds)))


def _resized(layer: nn.Module, ins: int, outs: int) -> nn.Module:
    """A layer of the same kind with other widths; the groups of a grouped convolution stay."""
    bias, kind = layer.bias is not None, next(kind for kind in LAYERS if isinstance(layer, kind))
    if kind is nn.Linear:
        return nn.Linear(ins, outs, bias)
    more = {"output_padding": layer.output_padding} if isinstance(layer, TRANSPOSED) else {}
    return kind(ins, outs, layer.kernel_size, layer.stride, layer.padding, dilation=layer.dilation,
                groups=ins if _depthwise(layer) else layer.groups, bias=bias, padding_mode=layer.padding_mode, **more)


def _wholes(network: nn.Module, groups: Groups, image: Tensor, batch_size: int, rounds: int) -> tuple[Whole, ...]:
    """Whole networks, timed in turns, so that a slow moment of the machine hits all of them."""
    widths, state = _random_widths(groups), network.state_dict()
    networks = [prepared(checkpoint.fit(copy.deepcopy(network), groups.sliced(state, [range(int(n)) for n in row]),
                                        "latency"), image.device) for row in widths]
    x, clock = example((batch_size, *image.shape[1:]), image.device), clock_for(image.device)
    with torch.inference_mode():
        for other in networks:
            clock.lap(lambda other=other: other(x), WARMUP)
        times = [[clock.lap(lambda other=other: other(x), 1)[0] for other in networks] for _ in range(rounds)]
    return tuple(Whole(tuple(ins.tolist()), tuple(outs.tolist()), _rounded(ms)) for ins, outs, ms in
                 zip(*groups.layer_widths(widths), np.median(times, 0)))


def _random_widths(groups: Groups) -> np.ndarray:
    """Those of the dense network, and of ever narrower ones [WHOLES, groups]; protected groups stay whole."""
    noise = np.random.default_rng(0).normal(0, SPREAD, (WHOLES, len(groups)))
    ratios = np.linspace(1, NARROWEST, WHOLES)[:, None] * np.exp(noise)
    ratios[0], ratios[:, [bool(group.protected) for group in groups]] = 1, 1
    return np.clip(np.rint(ratios * groups.sizes), 1, groups.sizes).astype(int)


def _rounded(ms: float) -> float:
    """Six digits: more would be noise."""
    return float(f"{ms:.6g}")

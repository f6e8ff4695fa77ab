"""Latency, throughput, energy, parameters and MACs of one network, with the same timing code as the pipeline."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar import admission, cost
from hobs_rspar.errors import UserError
from hobs_rspar.hardware.energy import WINDOW, Energy, Unreadable, find_meter, measure_energy
from hobs_rspar.hardware.timing import Samples, Schedule, clock_for, example, measure, prepared

WARMUP = 10  # untimed calls
SECONDS = 3.0  # per batch size in measure_all


class SystemMetrics:
    """What a network costs to run, on the device where its parameters are.

    Every method times a copy in evaluation mode and inference_mode, in the parameters' own type, with the CPU threads
    that PyTorch is set to; in channels_last where the network runs in it, else (as with ``view`` behind a convolution)
    in the default layout. The network that is passed in stays as it is, training mode included.
    """

    @staticmethod
    def measure_latency(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224),
                        num_iterations: int = 100) -> tuple[float, float]:
        """Time of one forward pass.

        Args:
            model: the network.
            input_shape: with the batch first.
            num_iterations: timed passes.

        Returns:
            Mean and standard deviation in ms.

        Raises:
            UserError: the shape does not fit the network, or an argument is not positive.
        """
        times = _times(model, input_shape, num_iterations)[0]
        return float(times.mean()), float(times.std(ddof=1)) if len(times) > 1 else 0.0

    @staticmethod
    def measure_throughput(model: nn.Module, batch_size: int = 64, input_shape: Sequence[int] = (3, 224, 224),
                           num_iterations: int = 50) -> float:
        """Images per second of wall-clock time.

        Args:
            model: the network.
            batch_size: images per pass.
            input_shape: of one image.
            num_iterations: timed passes.

        Raises:
            UserError: the shape does not fit the network, or an argument is not positive.
        """
        _, seconds = _times(model, (batch_size, *input_shape), num_iterations)
        return num_iterations * batch_size / seconds

    @staticmethod
    def count_parameters(model: nn.Module) -> int:
        """Number of parameters, trainable or not.

        Raises:
            UserError: it is no network, or a lazy layer has no shape yet.
        """
        admission.check_shapes(model)
        return sum(parameter.numel() for parameter in model.parameters())

    @staticmethod
    def count_flops(model: nn.Module, input_shape: Sequence[int] = (1, 3, 224, 224)) -> int:
        """Multiply-accumulates (MACs) of one image: what this project and most of the field call FLOPs.

        Counted is what PyTorch's own counter counts; twice this number is the count of single operations.

        Args:
            model: the network.
            input_shape: with the batch first; the count is per image whatever the batch.

        Raises:
            UserError: the network does not run on the shape, or it is one whose layers cannot be seen.
        """
        admission.check_visible(model)
        x = _input(model, input_shape)[:1]
        admission.check_example(model, x)
        return cost.count(model, x).macs

    @staticmethod
    def measure_all(model: nn.Module, batch_size: int = 64, input_shape: Sequence[int] = (3, 224, 224)) -> dict:
        """Everything: latency at batch 1, throughput at ``batch_size``, energy, size.

        Takes some seconds; longer by two windows of ten seconds where energy can be read.

        Args:
            model: the network.
            batch_size: images per pass for throughput and energy.
            input_shape: of one image.

        Returns:
            ``latency_ms`` (mean), ``latency_std_ms``, ``latency_p50_ms``, ``latency_p90_ms``, ``latency_p99_ms``,
            ``throughput_imgs_per_sec``, ``parameters``, ``flops`` (MACs), ``energy_j`` (per image, or None) and
            ``energy_reason``, ``batch_size``, ``device``, ``threads``.

        Raises:
            UserError: the shape does not fit the network.
        """
        flops = SystemMetrics.count_flops(model, (1, *input_shape))
        timed = measure_network(model, input_shape, (1, batch_size), SECONDS * 2)
        one, many = timed[1].summary(), timed[batch_size].summary()
        energy = network_energy(model, (batch_size, *input_shape), _energy_window(_device(model)))
        latency = {f"latency_{key}": one[f"{key}"] for key in ("std_ms", "p50_ms", "p90_ms", "p99_ms")}
        return {"latency_ms": one["mean_ms"], **latency, "throughput_imgs_per_sec": many["throughput"],
                "parameters": SystemMetrics.count_parameters(model), "flops": flops,
                "energy_j": energy.joules_per_image, "energy_reason": energy.reason, "batch_size": batch_size,
                "device": str(_device(model)), "threads": torch.get_num_threads()}


def measure_network(model: nn.Module, input_shape: Sequence[int], batch_sizes: Sequence[int],
                    seconds: float) -> dict[int, Samples]:
    """Times one network at several batch sizes.

    Args:
        model: the network; a copy of it is timed.
        input_shape: of one image.
        batch_sizes: images per pass.
        seconds: for all batch sizes together, warm-up included.

    Raises:
        UserError: the shape does not fit the network, or a batch size is not positive.
    """
    sizes = sorted(set(batch_sizes))
    timed = {}
    for size in sizes:
        network, x = _fitted(model, (size, *input_shape))
        timed[size] = measure([network], x, Schedule(seconds / len(sizes)))[0]
    return timed


def network_energy(model: nn.Module, input_shape: Sequence[int], window: float) -> Energy:
    """Energy per image of one network, or the reason why it is not measured.

    Args:
        model: the network; a copy of it runs.
        input_shape: with the batch first.
        window: seconds for the work, and as long again for idling.
    """
    network, x = _fitted(model, input_shape)
    with torch.inference_mode():
        return measure_energy({"network": lambda: network(x)}, len(x), x.device, window)["network"]


def _times(model: nn.Module, input_shape: Sequence[int], iterations: int) -> tuple[np.ndarray, float]:
    """Milliseconds of each pass, and the seconds of all of them."""
    if iterations < 1:
        raise UserError(f"num_iterations is {iterations}; it must be at least 1")
    network, x = _fitted(model, input_shape)
    clock = clock_for(x.device)
    with torch.inference_mode():
        clock.lap(lambda: network(x), WARMUP)
        start = time.perf_counter()
        times = clock.lap(lambda: network(x), iterations)
        return np.array(times), time.perf_counter() - start


def _fitted(model: nn.Module, input_shape: Sequence[int]) -> tuple[nn.Module, Tensor]:
    """A copy of ``model`` ready to be measured and an input that is known to fit it, in the layout in which it runs."""
    x = _input(model, input_shape)
    admission.check_copy(model)
    network = copy.deepcopy(model)
    admission.check_example(network, x)
    try:
        fast = prepared(network, x.device)
        rows = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        with torch.inference_mode():
            fast(rows)
        return fast, rows
    except Exception:  # a network that needs contiguous tensors; it ran a moment ago in the default layout
        return network.to(memory_format=torch.contiguous_format).eval(), x


def _input(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Random images of a shape, of the type and on the device of the network's parameters."""
    admission.check_shapes(model)
    if not isinstance(input_shape, Sequence) or not input_shape or \
            not all(isinstance(edge, Integral) and edge > 0 for edge in input_shape):
        shape = tuple(input_shape) if isinstance(input_shape, Sequence) else input_shape
        raise UserError(f"input shape {shape}: every entry must be a positive whole number, such as in (3, 224, 224)")
    x = example(input_shape, _device(model)).contiguous()
    floating = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    return x.to(floating[0]) if floating else x


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _energy_window(device: torch.device) -> float:
    """A full window where there is a counter; otherwise no time is spent on it."""
    try:
        find_meter(device)
    except Unreadable:
        return 0.0
    return WINDOW

"""What a timing cannot be: checks against the device's measured peak, and against the plan's own MACs and bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hobs_rspar.errors import UserError
from hobs_rspar.hardware.timing import Comparison, Samples, clock_for

SLACK = 0.05   # of a speedup's bounds, for the noise of a few seconds of measurement
MARGIN = 0.10  # of the measured peak, which a disturbed moment can only lower
LATENCY_MARGIN = 0.25  # between throughput and images / p50, which differ when there are slow outliers


@dataclass(frozen=True)
class Bounds:
    """Between which a speedup can lie when time is spent on arithmetic and on moving data alone."""

    lo: float
    hi: float

    @classmethod
    def of(cls, macs_ratio: float, bytes_ratio: float) -> Bounds:
        """From dense / pruned MACs (compute-bound) and dense / pruned bytes moved (memory-bound)."""
        return cls(min(macs_ratio, bytes_ratio), max(macs_ratio, bytes_ratio))

    def with_overhead(self) -> Bounds:
        """For a small batch: the fixed time per operator, equal on both sides, pulls a speedup towards 1."""
        return Bounds(min(1.0, self.lo), max(1.0, self.hi))

    def hold(self, comparison: Comparison) -> bool:
        """Whether the speedup's interval reaches into the bounds, give or take ``SLACK``."""
        return comparison.hi >= self.lo * (1 - SLACK) and comparison.lo <= self.hi * (1 + SLACK)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that every operator reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or every process that counts imports the compiler, 1.4 s

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.bytes += _bytes(args) + _bytes(out)
        return out


def _bytes(value) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def traffic(network: nn.Module, x: Tensor) -> int:
    """Bytes that one forward pass reads and writes when every operator goes through memory, weights included.

    Args:
        network: in evaluation mode.
        x: input [batch, ...]; the bytes are those of the whole batch.
    """
    mode = _Traffic()
    with torch.inference_mode(), mode:
        network(x)
    return mode.bytes


def peak_macs(device: torch.device, trials: int = 3) -> float:
    """Multiply-accumulates per second of large fp32 products here: the best of a few, of the fastest kind.

    On a CPU that is a matrix product or a 3x3 convolution, by the library: some reach half of what the other does. On a
    GPU it is a 1x1 convolution, so that the TF32 setting of convolutions holds for it, too.
    """
    clock = clock_for(device)

    def rate(product: Callable[[], Tensor], macs: int) -> float:
        clock.lap(product, 1)
        return macs / (min(clock.lap(product, trials)) / 1e3)

    def channels_last(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).to(memory_format=torch.channels_last)

    with torch.inference_mode():
        if device.type == "cuda":
            x, weight = channels_last(8, 8192, 32, 32), channels_last(8192, 8192, 1, 1)
            return rate(lambda: F.conv2d(x, weight), 8192**3)
        x, weight, square = channels_last(8, 256, 32, 32), channels_last(256, 256, 3, 3), torch.rand(1024, 1024)
        return max(rate(lambda: F.conv2d(x, weight, padding=1), 8 * 32**2 * 256**2 * 9),
                   rate(lambda: square @ square, 1024**3))


def peak_flags(samples: Sequence[Samples], macs: Sequence[int], device: torch.device) -> list[str]:
    """What to say where a throughput implies more arithmetic than the device was seen to do.

    It may be the peak that was measured in a slow moment: so it is measured twice, and no study stops.

    Args:
        samples: timings of some networks.
        macs: of one image, of the same networks.
        device: where they ran.
    """
    needed = max(sample.throughput * count for sample, count in zip(samples, macs))
    peak = peak_macs(device)
    if needed > peak * (1 + MARGIN):
        time.sleep(0.5)  # a disturbance during the first measurement is the likeliest cause
        peak = max(peak, peak_macs(device, trials=20))
    if needed <= peak * (1 + MARGIN):
        return []
    return [f"batch {samples[0].images}: the throughput implies {needed / 1e9:.0f} GMAC/s, but large products "
            f"reached only {peak / 1e9:.0f} GMAC/s here, twice; the machine was busy, or the timing is wrong"]


def speedup_flag(comparison: Comparison, bounds: Bounds) -> str:
    """What to say of a speedup that was outside its bounds twice."""
    batch = comparison.dense.images
    side = ("below", bounds.lo) if comparison.speedup < bounds.lo else ("above", bounds.hi)
    return (f"batch {batch}: speedup {comparison.speedup:.2f} is {side[0]} the plan's own bound {side[1]:.2f} "
            f"(MACs and bytes moved: {bounds.lo:.2f} to {bounds.hi:.2f}); measured twice")


def timing_flags(samples: Samples, name: str, threads: int) -> list[str]:
    """What is suspicious about one network's timing: a busy machine, or a throughput that its latency denies."""
    found, batch = [], samples.images
    if samples.disturbed(threads):
        share = samples.cpu_seconds / samples.wall_seconds
        found.append(f"batch {batch}, {name}: CPU time is {share:.2f} of wall-clock time; something else was running")
    expected = 1e3 * samples.images / samples.median
    if abs(samples.throughput / expected - 1) > LATENCY_MARGIN:
        found.append(f"batch {batch}, {name}: {samples.throughput:.4g} images/s, but images / p50 is {expected:.4g}/s")
    return found


def require_within_power_cap(watts: float, cap_watts: float | None, what: str) -> None:
    """Energy per image x throughput must not exceed the power limit, give or take 10 % for its regulation.

    Raises:
        UserError: it does.
    """
    if cap_watts is not None and watts > 1.1 * cap_watts:
        raise UserError(f"{what}: energy per image x images per second is {watts:.0f} W, but the power limit is "
                        f"{cap_watts:.0f} W; the measurement cannot be right. Run it again on an idle machine")


def peak_memory_mb(network: nn.Module, x: Tensor) -> float | None:
    """Largest GPU memory in MB of one forward pass, the network's own weights included; None on a CPU."""
    if x.device.type != "cuda":
        return None
    torch.cuda.synchronize(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    before = torch.cuda.memory_allocated(x.device)
    with torch.inference_mode():
        network(x)
    torch.cuda.synchronize(x.device)
    weights = sum(_bytes(tensor) for tensor in network.state_dict().values())
    return (torch.cuda.max_memory_allocated(x.device) - before + weights) / 1e6

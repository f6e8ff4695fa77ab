"""Interleaved timing: networks take turns on the same input, so that a slow moment of the machine hits all of them.

A round gives every network the same number of calls; the order turns round from one round to the next, so that drift
cancels. Each call is timed by itself (percentiles); the ratio's interval resamples whole rounds, because calls within
one are not independent.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

BUSY = 0.2  # a difference between wall-clock and CPU time that means: something else was running
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Schedule:
    """How long to measure.

    Attributes:
        seconds: in total, warm-up included, for all networks together.
        warmup: share of the seconds for warm-up.
        rounds: rounds to aim at; calls per round follow from it.
        min_rounds: rounds that are measured even if the seconds are over.
    """

    seconds: float
    warmup: float = 0.2
    rounds: int = 30
    min_rounds: int = 3


@dataclass(frozen=True)
class Samples:
    """Times of one network at one batch size.

    Attributes:
        milliseconds: of every call, float64 [rounds, calls].
        images: per call.
        wall_seconds: around all rounds of this network.
        cpu_seconds: CPU time of this process in them, all threads together; None where it says nothing (GPU).
    """

    milliseconds: np.ndarray
    images: int
    wall_seconds: float
    cpu_seconds: float | None = None

    @property
    def median(self) -> float:
        """Milliseconds."""
        return float(np.median(self.milliseconds))

    @property
    def throughput(self) -> float:
        """Images per second of wall-clock time, counted over all rounds and not derived from the latency."""
        return self.milliseconds.size * self.images / self.wall_seconds

    def disturbed(self, threads: int) -> bool:
        """Whether CPU time and wall-clock time differ by more than ``BUSY``: something else was running.

        With several threads some may rest, so only less than one busy thread counts as too little.
        """
        if self.cpu_seconds is None:
            return False
        share = self.cpu_seconds / self.wall_seconds
        return share < 1 - BUSY or share > threads * (1 + BUSY)

    def summary(self) -> dict:
        """Percentiles, mean and standard deviation in ms, images per second, and the number of timed calls."""
        times = self.milliseconds
        p50, p90, p99 = np.percentile(times, [50, 90, 99])
        deviation = times.std(ddof=1) if times.size > 1 else 0.0
        values = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "mean_ms": times.mean(), "std_ms": deviation,
                  "throughput": self.throughput}
        return {key: _rounded(value) for key, value in values.items()} | {"iterations": int(times.size)}


@dataclass(frozen=True)
class Comparison:
    """Two networks on the same input. ``speedup`` is dense time / pruned time, of medians: above 1 is faster."""

    dense: Samples
    pruned: Samples
    speedup: float
    lo: float
    hi: float

    @classmethod
    def of(cls, dense: Samples, pruned: Samples) -> Comparison:
        lo, hi = speedup_interval(dense.milliseconds, pruned.milliseconds)
        return cls(dense, pruned, dense.median / pruned.median, lo, hi)

    def record(self) -> dict:
        return {"dense": self.dense.summary(), "pruned": self.pruned.summary(), "speedup": _rounded(self.speedup),
                "speedup_lo": _rounded(self.lo), "speedup_hi": _rounded(self.hi)}


class CpuClock:
    """Wall-clock time around each call, with the process's CPU time as a cross-check."""

    warmup_calls = 3

    def now(self) -> float:
        return time.perf_counter()

    def cpu(self) -> float | None:
        return time.process_time()

    def lap(self, call: Callable[[], object], calls: int) -> list[float]:
        """Milliseconds of each of ``calls`` calls."""
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times


class CudaClock(CpuClock):
    """CUDA events around each call; the device is idle before it, so that launching is part of the latency."""

    warmup_calls = 50

    def __init__(self, device: torch.device):
        self.device = device

    def cpu(self) -> float | None:
        return None  # the process spins or sleeps while the GPU works

    def lap(self, call: Callable[[], object], calls: int) -> list[float]:
        times = []
        with torch.cuda.device(self.device):
            for _ in range(calls):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                call()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return times


def clock_for(device: torch.device) -> CpuClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's CPU threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prepared(network: nn.Module, device: torch.device) -> nn.Module:
    """``network`` itself, as every measurement here wants it: on the device, channels_last, evaluation mode."""
    return network.to(device=device, memory_format=torch.channels_last).eval()


def example(shape: Sequence[int], device: torch.device) -> Tensor:
    """Normal random numbers of ``shape`` (batch first), always the same, channels_last where that exists."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return x.to(device, memory_format=torch.channels_last) if x.dim() == 4 else x.to(device)


def compare(dense: nn.Module, pruned: nn.Module, x: Tensor, schedule: Schedule) -> Comparison:
    """Times two :func:`prepared` networks in turn.

    Args:
        dense: the reference.
        pruned: the network that is compared to it.
        x: the input [batch, ...] on the networks' device.
        schedule: how long.
    """
    return Comparison.of(*measure([dense, pruned], x, schedule))


def measure(networks: Sequence[nn.Module], x: Tensor, schedule: Schedule) -> list[Samples]:
    """Times :func:`prepared` networks in turn on ``x`` [batch, ...]; one entry per network."""
    with torch.inference_mode():
        calls = [lambda network=network: network(x) for network in networks]
        return interleave(calls, len(x), schedule, clock_for(x.device))


def interleave(calls: Sequence[Callable[[], object]], images: int, schedule: Schedule, clock) -> list[Samples]:
    """Runs ``calls`` in turn and times each of them.

    Args:
        calls: what to time.
        images: that one call handles.
        schedule: how long.
        clock: a :class:`CpuClock` or what behaves like one.
    """
    begin = clock.now()
    laps: list[list] = [[] for _ in calls]
    with _no_garbage_collection():
        repeats = _warm_up(calls, schedule, clock)
        start = clock.now()
        while _goes_on(len(laps[0]), schedule, begin, start, clock.now()):
            turn = 1 if len(laps[0]) % 2 == 0 else -1
            for index in range(len(calls))[::turn]:
                laps[index].append(_round(calls[index], repeats, clock))
    return [_samples(rounds, images) for rounds in laps]


def speedup_interval(dense: np.ndarray, pruned: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap over rounds of median(dense) / median(pruned).

    Args:
        dense: times [rounds, calls].
        pruned: times [rounds, calls] of the same rounds.
        seed: of the generator, which is this function's own.

    Returns:
        Lower and upper end of the interval at ``CONFIDENCE``.
    """
    random = np.random.default_rng(seed)
    ratios = np.empty(RESAMPLES)
    for resample in range(RESAMPLES):
        rounds = random.integers(len(dense), size=len(dense))
        ratios[resample] = np.median(dense[rounds]) / np.median(pruned[rounds])
    lo, hi = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(lo), float(hi)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _warm_up(calls, schedule: Schedule, clock) -> int:
    """Runs the calls in turn; returns how many calls of each fit a round."""
    begin, done = clock.now(), 0
    while True:
        slowest = max(clock.lap(call, 1)[0] for call in calls) / 1e3
        done, spent = done + 1, clock.now() - begin
        enough = done >= clock.warmup_calls or spent >= schedule.seconds / 2
        if enough and spent >= schedule.warmup * schedule.seconds:
            break
    left = max(schedule.seconds - spent, 0)
    return max(1, int(left / (schedule.rounds * len(calls) * max(slowest, 1e-9))))


def _goes_on(rounds: int, schedule: Schedule, begin: float, start: float, now: float) -> bool:
    """Whether another round fits into the seconds."""
    per_round = (now - start) / max(rounds, 1)
    return rounds < schedule.min_rounds or now + per_round <= begin + schedule.seconds


def _round(call, repeats: int, clock) -> tuple[list[float], float, float | None]:
    """Times of one round, its wall-clock seconds and its CPU seconds."""
    wall, cpu = clock.now(), clock.cpu()
    times = clock.lap(call, repeats)
    return times, clock.now() - wall, None if cpu is None else clock.cpu() - cpu


def _samples(rounds: list[tuple], images: int) -> Samples:
    times, walls, cpus = zip(*rounds)
    return Samples(np.array(times), images, sum(walls), None if cpus[0] is None else sum(cpus))


def _rounded(value: float) -> float:
    """Six significant digits: more than any timing carries, and stable to read in a diff."""
    return float(f"{value:.6g}")

"""One cell on this platform: its recovered network against the dense one, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hobs_rspar import cost
from hobs_rspar.hardware import physics
from hobs_rspar.hardware.energy import WINDOW, Energy, measure_energy
from hobs_rspar.hardware.platform import power_cap_watts, readings
from hobs_rspar.hardware.timing import Comparison, Samples, Schedule, compare, example, prepared

NAMES = ("dense", "pruned")
CPU_MEMORY = "not measured: PyTorch keeps no peak of CPU memory, and the process's own peak holds both networks"
REPEAT = 0.5  # of the first measurement's seconds, for a speedup that was outside its bounds


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        dense: the reference.
        pruned: the recovered network.
        image: one input [1, C, H, W].
        batch_sizes: images per call.
        seconds: of work, for all batch sizes together; half of them go to energy when its windows fit.
        threads: CPU threads, already set.
        device: where.
    """

    dense: nn.Module
    pruned: nn.Module
    image: Tensor
    batch_sizes: tuple[int, ...]
    seconds: float
    threads: int
    device: torch.device

    @property
    def window(self) -> float:
        """Seconds of one energy window: idle, dense and pruned share half of the seconds."""
        return self.seconds / 2 / 3

    @property
    def batch_seconds(self) -> float:
        """Seconds of timing at one batch size."""
        timed = self.seconds / 2 if self.window >= WINDOW else self.seconds
        return timed / len(self.batch_sizes)

    @property
    def conditions(self) -> dict:
        """Under which every number of the record was taken."""
        clock = "CUDA events, device idle before each call" if self.device.type == "cuda" else "wall clock"
        return {"mode": "eager", "dtype": "fp32", "layout": "channels_last", "threads": self.threads,
                "batchnorm": "as trained", "image": list(self.image.shape[1:]), "seconds": self.seconds,
                "clock": clock,
                "order": "dense and pruned in turn, reversed every round", "processes": 1,
                "interval": "95 % percentile bootstrap over rounds of the ratio of medians"}


@dataclass(frozen=True)
class Batch:
    """Both networks at one batch size."""

    x: Tensor
    comparison: Comparison
    bounds: physics.Bounds
    flags: list[str]

    @property
    def samples(self) -> tuple[Samples, Samples]:
        return self.comparison.dense, self.comparison.pruned


def measure_cell(job: Job) -> dict:
    """Measures both networks, which it moves to the device.

    Returns:
        The measured part of a platform record: conditions, batches, bounds, memory, energy, power, readings, flags.

    Raises:
        UserError: a number that physics does not allow.
    """
    macs = [cost.count(network.cpu(), job.image).macs for network in (job.dense, job.pruned)]
    networks = [prepared(network, job.device) for network in (job.dense, job.pruned)]
    before = readings(job.device)
    batches = {size: _measure_batch(job, networks, macs, size) for size in sorted(job.batch_sizes)}
    largest = batches[max(batches)]
    return {"conditions": job.conditions,
            "batches": {str(size): batch.comparison.record() | {"bounds": _bounds_record(batch.bounds)}
                        for size, batch in batches.items()},
            "bounds": _bounds_record(largest.bounds),
            **_memory(networks, largest), **_energy(job, networks, largest),
            "readings": {"before": before, "after": readings(job.device)},
            "flags": [flag for batch in batches.values() for flag in batch.flags]}


def _measure_batch(job: Job, networks: list[nn.Module], macs: list[int], size: int) -> Batch:
    x = example((size, *job.image.shape[1:]), job.device)
    dense_bytes, pruned_bytes = (physics.traffic(network, x) for network in networks)
    bounds = physics.Bounds.of(macs[0] / macs[1], dense_bytes / pruned_bytes)
    if size < max(job.batch_sizes):
        bounds = bounds.with_overhead()
    comparison, flags = _within(networks, x, job.batch_seconds, bounds)
    batch = Batch(x, comparison, bounds, flags)
    for name, samples in zip(NAMES, batch.samples):
        flags += physics.timing_flags(samples, name, job.threads)
    flags += physics.peak_flags(batch.samples, macs, job.device)
    return batch


def _within(networks: list[nn.Module], x: Tensor, seconds: float,
            bounds: physics.Bounds) -> tuple[Comparison, list[str]]:
    """A speedup outside its bounds is measured once more, and flagged if it stays there."""
    comparison = compare(*networks, x, Schedule(seconds))
    if bounds.hold(comparison):
        return comparison, []
    comparison = compare(*networks, x, Schedule(seconds * REPEAT))
    return comparison, [] if bounds.hold(comparison) else [physics.speedup_flag(comparison, bounds)]


def _bounds_record(bounds: physics.Bounds) -> dict:
    return {"lo": round(bounds.lo, 4), "hi": round(bounds.hi, 4)}


def _memory(networks: list[nn.Module], batch: Batch) -> dict:
    peaks = {name: physics.peak_memory_mb(network, batch.x) for name, network in zip(NAMES, networks)}
    measured = peaks["dense"] is not None
    return {"peak_memory_mb": peaks if measured else None, "peak_memory_reason": None if measured else CPU_MEMORY}


def _energy(job: Job, networks: list[nn.Module], batch: Batch) -> dict:
    """Energy and power at the largest batch, or the reasons."""
    calls = {name: lambda network=network: network(batch.x) for name, network in zip(NAMES, networks)}
    with torch.inference_mode():
        found = measure_energy(calls, len(batch.x), job.device, job.window)
    reason = found["dense"].reason
    if reason is not None:
        return {"energy": None, "energy_reason": reason, "power": None, "power_reason": reason}
    for name, samples in zip(NAMES, batch.samples):
        watts = found[name].joules_per_image * samples.throughput
        physics.require_within_power_cap(watts, power_cap_watts(job.device), f"batch {len(batch.x)}, {name}")
    return {"energy": _energy_record(found, len(batch.x)), "energy_reason": None,
            "power": {f"{name}_w": energy.watts for name, energy in found.items()}
            | {"idle_w": found["dense"].idle_watts}, "power_reason": None}


def _energy_record(found: dict[str, Energy], batch: int) -> dict:
    joules = {f"{name}_j": energy.joules_per_image for name, energy in found.items()}
    return joules | {"per": "image", "batch": batch, "source": found["dense"].source}

"""Energy per image from counters of the hardware, in windows of at least ten seconds. Never an estimate.

A GPU's board energy comes from NVML's total-energy counter (Volta and later), a CPU's package energy from RAPL through
Linux's powercap interface. Where neither can be read, the result is nothing and a reason that says what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hobs_rspar.hardware.platform import nvml_handle
from hobs_rspar.hardware.timing import clock_for

WINDOW = 10.0  # seconds; NVML's counter moves about ten times a second, so a window this long is exact to a percent
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Energy of one network at one batch size, or the reason why there is none.

    Attributes:
        joules_per_image: with the idle power included.
        watts: mean power in the window.
        idle_watts: mean power of a window without work, to be shown apart.
        source: what was read.
        reason: ``not measured: ...``, or None when it was.
    """

    joules_per_image: float | None = None
    watts: float | None = None
    idle_watts: float | None = None
    source: str | None = None
    reason: str | None = None


class Unreadable(Exception):
    """There is no energy counter; the text says what is missing."""


class NvmlMeter:
    """Board energy of one NVIDIA GPU."""

    source = "GPU board, NVML total-energy counter"

    def __init__(self, device: torch.device):
        self.nvml, self.handle = nvml_handle(device)
        if self.nvml is None:
            raise Unreadable(self.handle)
        try:
            self.joules()
        except self.nvml.NVMLError as problem:
            raise Unreadable(f"the GPU has no total-energy counter ({problem})") from None

    def joules(self) -> float:
        """Joules since the driver was loaded."""
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3


class RaplMeter:
    """Energy of all CPU packages. Other processes' work is in it, too."""

    source = "CPU packages, RAPL"

    def __init__(self, root: Path = POWERCAP):
        if not root.is_dir():
            raise Unreadable(f"RAPL counters are not there ({root} does not exist)")
        self.files = sorted(root.glob("intel-rapl:[0-9]*/energy_uj"))
        self.files = [file for file in self.files if file.parent.name.count(":") == 1]
        if not self.files:
            raise Unreadable(f"RAPL counters are not there ({root} holds no intel-rapl package)")
        try:
            self.ranges = [int((file.parent / "max_energy_range_uj").read_text()) for file in self.files]
            self.last, self.total = self._read(), 0
        except OSError:
            raise Unreadable(f"RAPL counters are not readable ({self.files[0]} wants more rights)") from None

    def _read(self) -> list[int]:
        return [int(file.read_text()) for file in self.files]

    def joules(self) -> float:
        """Joules since this object was made; a counter that started again at 0 is taken into account."""
        now = self._read()
        self.total += sum((new - old) % (limit + 1) for new, old, limit in zip(now, self.last, self.ranges))
        self.last = now
        return self.total / 1e6


def find_meter(device: torch.device) -> NvmlMeter | RaplMeter:
    """The energy counter of ``device``.

    Raises:
        Unreadable: there is none.
    """
    return NvmlMeter(device) if device.type == "cuda" else RaplMeter(POWERCAP)


def measure_energy(calls: dict[str, Callable[[], object]], images: int, device: torch.device,
                   window: float) -> dict[str, Energy]:
    """Energy per image of each call.

    Args:
        calls: name -> one forward pass.
        images: that one call handles.
        device: where they run.
        window: seconds for each call, and as long again for idling; below ``WINDOW`` nothing is measured.

    Returns:
        Name -> energy, or the reason.
    """
    try:
        meter = find_meter(device)
    except Unreadable as problem:
        return {name: Energy(reason=f"not measured: {problem}") for name in calls}
    if window < WINDOW:
        reason = f"not measured: window shorter than {WINDOW:g} s ({window:.3g} s)"
        return {name: Energy(reason=reason) for name in calls}
    idle, seconds, _ = _window(meter, lambda: time.sleep(0.1), window)
    return {name: _energy(meter, call, images, device, window, idle / seconds) for name, call in calls.items()}


def _energy(meter, call, images: int, device: torch.device, window: float, idle_watts: float) -> Energy:
    clock = clock_for(device)
    joules, seconds, count = _window(meter, lambda: clock.lap(call, 1), window)
    return Energy(joules / (count * images), joules / seconds, idle_watts, meter.source)


def _window(meter, work: Callable[[], object], seconds: float) -> tuple[float, float, int]:
    """Joules, seconds and repetitions of ``work`` in one window."""
    count, begin, joules = 0, time.perf_counter(), meter.joules()
    while time.perf_counter() - begin < seconds:
        work()
        count += 1
    joules = meter.joules() - joules
    return joules, time.perf_counter() - begin, count

"""Named sections of a program, timed: with synchronisation where there is a GPU."""

from __future__ import annotations

import time

import torch

from hobs_rspar.errors import UserError


class GPUProfiler:
    """Times named sections; sections may be nested, and a name may come again.

    On a GPU, ``start`` and ``end`` wait for its work, so that a section holds what it launched; that makes a program
    slower, which is why a profiler can be switched off. Without a GPU it times the CPU.

    Args:
        enabled: False makes all methods do nothing.

    Example:
        >>> profiler = GPUProfiler()
        >>> profiler.start("forward"); profiler.end("forward")
        >>> profiler.get_summary()["forward"]["count"]
        1
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._open: dict[str, float] = {}
        self._times: dict[str, list[float]] = {}

    def start(self, name: str) -> None:
        """Begins section ``name``.

        Raises:
            UserError: it has begun already.
        """
        if not self.enabled:
            return
        if name in self._open:
            raise UserError(f"GPUProfiler: section '{name}' has already begun; call end('{name}') first")
        self._open[name] = _now()

    def end(self, name: str) -> None:
        """Ends section ``name``.

        Raises:
            UserError: it has not begun.
        """
        if not self.enabled:
            return
        if name not in self._open:
            begun = ", ".join(self._open) or "none"
            raise UserError(f"GPUProfiler: section '{name}' has not begun (begun: {begun}); call start('{name}') first")
        self._times.setdefault(name, []).append(1e3 * (_now() - self._open.pop(name)))

    def get_summary(self) -> dict[str, dict[str, float]]:
        """Ended sections in order of first end: ``count``, and ``total_ms``, ``mean_ms``, ``min_ms``, ``max_ms``."""
        return {name: {"count": len(times), "total_ms": sum(times), "mean_ms": sum(times) / len(times),
                       "min_ms": min(times), "max_ms": max(times)} for name, times in self._times.items()}

    def print_summary(self) -> None:
        """Prints the summary as a table, the longest section first."""
        print(f"{'section':<24}{'count':>7}{'total ms':>12}{'mean ms':>12}{'min ms':>12}{'max ms':>12}")
        rows = sorted(self.get_summary().items(), key=lambda item: -item[1]["total_ms"])
        for name, row in rows:
            print(f"{name:<24}{row['count']:>7}{row['total_ms']:>12.3f}{row['mean_ms']:>12.3f}{row['min_ms']:>12.3f}"
                  f"{row['max_ms']:>12.3f}")


def _now() -> float:
    """Seconds, after the GPU's pending work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()

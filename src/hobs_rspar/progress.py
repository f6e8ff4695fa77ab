"""Progress: one bar per stage, on its outer loop, silent without a terminal; and what each phase of a call took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from tqdm import tqdm

from hobs_rspar.memory import peak_memory, return_freed_memory

PHASE = "{desc}, phase {n_fmt} of {total_fmt} [{elapsed}]"  # how long the phase takes, its own bar says
_SHOWN = ContextVar("_SHOWN", default=True)


def bar(iterable, name: str, total: int | None = None):
    """Iterates with a progress bar that carries the cell's or stage's name."""
    return tqdm(iterable, desc=name, total=total, disable=_disabled(), leave=False)


@contextmanager
def image_bar(name: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts images; yields the function that advances it."""
    with tqdm(desc=name, total=images, unit="img", unit_scale=True, disable=_disabled(), leave=False) as shown:
        yield shown.update


@contextmanager
def showing(wanted: bool) -> Iterator[None]:
    """Inside the block there are no bars unless they are wanted, with or without a terminal."""
    token = _SHOWN.set(wanted and _SHOWN.get())
    try:
        yield
    finally:
        _SHOWN.reset(token)


class Phases:
    """What the phases of one call take; the phase at work stands on a bar, above that of its own loop.

    A phase may begin inside another one, which then waits: seconds are a phase's own.

    Args:
        name: of the call.
        order: names of all phases.

    Attributes:
        seconds: of every phase that has run.
        peak_memory: bytes, the most that the process had held by the end of the phase's last part; empty where the
            system does not say.
    """

    def __init__(self, name: str, order: Sequence[str]):
        self.name, self.order = name, list(order)
        self.seconds: dict[str, float] = {}
        self.peak_memory: dict[str, int] = {}
        self._open: list[str] = []
        self._since = 0.0
        self._bar: tqdm | None = None

    @contextmanager
    def run(self) -> Iterator[Phases]:
        """Shows the bar inside the block."""
        with tqdm(total=len(self.order), desc=self.name, disable=_disabled(), leave=False, bar_format=PHASE) as shown:
            self._bar = shown
            yield self

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside the block the time is this phase's."""
        self._switch()
        self._open.append(name)
        self._show()
        return_freed_memory()
        try:
            yield
        finally:
            self._switch()
            self._open.pop()
            if peak := peak_memory():
                self.peak_memory[name] = peak
            self._show()

    def _switch(self) -> None:
        """Gives the time since the last change to the phase that was at work."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    def _show(self) -> None:
        if self._bar is not None and self._open:
            self._bar.set_description(f"{self.name}: {self._open[-1]}", refresh=False)
            self._bar.n = self.order.index(self._open[-1]) + 1
            self._bar.refresh()


def _disabled() -> bool | None:
    """For tqdm: None leaves it to whether there is a terminal."""
    return None if _SHOWN.get() else True

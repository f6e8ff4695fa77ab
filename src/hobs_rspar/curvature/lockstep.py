"""Passes of many batches side by side, each of which waits before every layer until all of them are there.

So a layer can be refitted from all images, and all images go on through what was refitted, while only what is alive at
one point of the network is held: as if all images were passed at once, for a small part of the memory. A pass that can
wait runs in a thread of its own; only one of them ever runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import ref

import torch
from torch import Tensor, nn

from hobs_rspar.memory import return_freed_memory


class Walk(threading.Thread):
    """One batch's way through a network.

    Args:
        network: with the hooks of :func:`watched`.
        x: images [N, C, H, W].
    """

    def __init__(self, network: nn.Module, x: Tensor):
        super().__init__(daemon=True)
        self._network, self._images = network, [x]
        self._wanted: str | None = None
        self._value: Tensor | None = None
        self._problem: BaseException | None = None
        self._go, self._still = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self._go.acquire()
        try:
            with torch.no_grad():  # of this thread
                if self._wanted is not None:
                    self._network(self._images.pop())
        except _Enough:
            pass
        except BaseException as problem:  # whatever it is, it is raised where the walk is waited for
            self._problem = problem
        self._value = None
        self._still.release()

    def until(self, layer: str) -> Tensor | None:
        """Goes on to a layer; what it gets or gives there, or None if the pass has ended without it."""
        self._wanted = layer
        self._go.release()
        self._still.acquire()
        if self._problem is not None:
            raise self._problem
        return self._value

    def end(self) -> None:
        """Ends the pass where it is."""
        self._wanted = None
        self._go.release()
        self.join()

    def at(self, layer: str, value: Tensor) -> None:
        """Called by the hooks, in this thread."""
        if layer == self._wanted:
            self._value = value
            self._still.release()
            self._go.acquire()
            self._value = None
            if self._wanted is None:
                raise _Enough


class _Enough(Exception):
    """Nothing that comes after is of interest."""


@contextmanager
def watched(network: nn.Module, layers: Sequence[str], before: bool) -> Iterator[None]:
    """Inside the block walks wait at layers: ``before`` them with their input, else after them with their output."""
    def at(name: str, value: Tensor) -> None:
        walk = threading.current_thread()
        if isinstance(walk, Walk):
            walk.at(name, value)

    hooks = [network.get_submodule(name).register_forward_pre_hook(
        lambda _layer, inputs, name=name: at(name, inputs[0])) if before else
        network.get_submodule(name).register_forward_hook(
        lambda _layer, _inputs, out, name=name: at(name, out)) for name in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def in_step(networks: tuple[nn.Module, nn.Module], stops: dict[str, bool], batches: Sequence[Callable[[], Tensor]],
            together: Sequence[int], see: Callable[[str, int, Tensor, Tensor | None], None],
            done: Callable[[str], None]) -> None:
    """Takes batches through two networks, stop by stop.

    Args:
        networks: the one whose inputs are seen, and the one whose outputs are.
        stops: layers in order of execution, and whether the second network's output there is seen, too.
        batches: functions that give images [N, C, H, W].
        together: how many batches wait at each stop, never falling; those that come later take the first layers as
            they have become.
        see: gets layer, number of the batch, input in the first network, output in the second or None.
        done: gets a layer that all batches have reached, before any goes on.
    """
    walks: list[tuple[Walk, Walk]] = []
    both = [name for name, compared in stops.items() if compared]
    with watched(networks[0], list(stops), before=True), watched(networks[1], both, before=False):
        try:
            for (layer, compared), count in zip(stops.items(), together):
                here = len(walks)
                walks += [tuple(Walk(network, batch()) for network in networks) for batch in batches[here:count]]
                for number, (first, second) in enumerate(walks):
                    see(layer, number, first.until(layer), second.until(layer) if compared else None)
                    if number >= here:  # it has come a long way
                        return_freed_memory()
                done(layer)
                return_freed_memory()
        finally:
            for walk in (walk for pair in walks for walk in pair):
                walk.end()


@torch.no_grad()
def alive(network: nn.Module, layers: Sequence[str], image: Tensor) -> list[int]:
    """Bytes of activations that are held while a pass of one image waits before each layer.

    Seen are what modules get and give; what functions make in between is alive as some module's input, or soon gone.
    """
    seen: dict[int, ref] = {}
    found: dict[str, int] = {}

    def keep(*values) -> None:
        for value in values:
            if isinstance(value, Tensor):
                seen[value.untyped_storage().data_ptr()] = ref(value)

    def measure(name: str) -> None:
        left = {place: value() for place, value in seen.items()}
        found.setdefault(name, sum(t.numel() * t.element_size() for t in left.values() if t is not None))

    hooks = [module.register_forward_pre_hook(lambda _m, inputs: keep(*inputs)) for module in network.modules()]
    hooks += [module.register_forward_hook(lambda _m, _inputs, out: keep(out)) for module in network.modules()]
    hooks += [network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: measure(name))
              for name in layers]
    try:
        network(image)
    finally:
        for handle in hooks:
            handle.remove()
    return [found[name] for name in layers]

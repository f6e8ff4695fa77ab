"""Progress bars: one per stage, on its outer loop, silent without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def bar(iterable, name: str, total: int | None = None):
    """Iterates with a progress bar that carries the cell's or stage's name."""
    return tqdm(iterable, desc=name, total=total, disable=None, leave=False)


@contextmanager
def image_bar(name: str, images: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts images; yields the function that advances it."""
    with tqdm(desc=name, total=images, unit="img", unit_scale=True, disable=None, leave=False) as shown:
        yield shown.update

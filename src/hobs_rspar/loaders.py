"""From a user's DataLoader to a bounded number of images in memory: what the public API works on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count, islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hobs_rspar import batches as one
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.progress import bar
from hobs_rspar.seeds import derived_seed, generator

SEEN = 4  # times the wanted number: so many images are read from a loader of which nothing but its batches is known
ROOM = 4096  # images that there is room for at first: "all of them" may be said by any large number
BATCH = 64  # images a batch where the loader does not say


def from_loader(dataloader, batches: int | None = None) -> tuple[Images, int]:
    """Some batches of a loader, which must yield (images, labels) with images as the network wants them.

    Args:
        dataloader: yields (float [n, C, H, W], int [n]), or mappings with an image and a label.
        batches: how many to take, random ones where the loader's images or batches have indices, else the first; None
            takes all, in order.

    Returns:
        The images, as they are (mean 0, unit scale), and the size of the first batch.

    Raises:
        UserError: the loader yields nothing, or something else.
    """
    size = getattr(dataloader, "batch_size", None) or BATCH
    with _seeded(0):
        drawn = _Source(dataloader) if batches is None else _drawn(dataloader, batches * size, 0)
        taken = list(islice(_checked(drawn), batches))
    if not taken:
        raise UserError("the dataloader is empty; give one that yields (images, labels)")
    pixels, labels = (torch.cat(parts) for parts in zip(*taken))
    return _as_they_are(pixels, labels), len(taken[0][1])


def sample(dataloader, wanted: int, seed: int = 0) -> Images:
    """A random sample of a loader's images, in an order of which every part from the start has all classes alike.

    Of a DataLoader over a map-style data set just ``wanted`` images are loaded, at random indices that its own sampler
    gives; of a list of batches, random ones; of anything else the first ``SEEN`` times ``wanted`` images are read at
    most, and a sample of those is kept.

    Args:
        dataloader: as for :func:`from_loader`; may be endless.
        wanted: images to take at most.
        seed: of what is drawn.

    Returns:
        Up to ``wanted`` images, as they are.

    Raises:
        UserError: the loader yields nothing, or something else.
    """
    with _seeded(seed):
        batches = bar(_checked(_drawn(dataloader, wanted, seed)), "images")
        pixels, labels = _reservoir(batches, wanted, generator(seed, "reservoir"))
    order = stratified(labels, generator(seed, "order"))
    _permute(pixels, order)
    return _as_they_are(pixels, labels[order])


def stratified(labels: Tensor, random: torch.Generator) -> Tensor:
    """A random order [n] of which every part from the start holds the classes in about their proportions.

    Args:
        labels: [n].
        random: draws the order.
    """
    place = torch.rand(len(labels), generator=random, dtype=torch.double)
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        offset = torch.rand((), generator=random, dtype=torch.double)
        place[own[place[own].argsort()]] = (torch.arange(len(own), dtype=torch.double) + offset) / len(own)
    return place.argsort(stable=True)


def _as_they_are(pixels: Tensor, labels: Tensor) -> Images:
    channels = pixels.shape[1]
    return Images(pixels, labels, torch.zeros(channels), torch.full((channels,), 1 / 255), torch.contiguous_format)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A sampler's and a transform's random numbers depend on the seed, too; the caller's go on as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derived_seed(seed, "loader"))
        yield


@dataclass(frozen=True)
class _Source:
    """Batches to read, and what messages call them.

    Attributes:
        batches: of the user's making.
        numbers: of the batches, in the order in which they are read.
        drawn: of every batch the indices of its images in the data set, where they are known.
    """

    batches: Iterable
    numbers: Iterable[int] = field(default_factory=count)
    drawn: Sequence[Sequence] | None = None


def _checked(source: _Source) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches as tensors; refuses what is none, and what differs from the first one's shape."""
    shape = None
    for where, indices, batch in _raw(source):
        images, labels = one.tensors(batch, where, indices)
        shape = shape or images.shape[1:]
        if images.shape[1:] != shape:
            raise UserError(f"the images of {where} have shape {list(images.shape[1:])}, those of other batches "
                            f"{list(shape)}; resize them to one size")
        yield images, labels


def _raw(source: _Source) -> Iterator[tuple[str, Sequence, object]]:
    """The batches, each with what it and its images are called; errors of the user's own code get one sentence."""
    iterator = None
    for index in source.numbers:
        indices = () if source.drawn is None or index >= len(source.drawn) else source.drawn[index]
        where = f"the batch of the data set's images {', '.join(map(str, indices[:3]))}{', …' * (len(indices) > 3)}" \
            if indices else f"batch {index}"
        try:
            iterator = iter(source.batches) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as problem:  # of the data set, its transforms, the collation, or a worker
            raise UserError(f"the dataloader failed at {where}: {_cause(problem)}. Iterating over it must work by "
                            "itself") from problem
        yield where, indices, batch


def _cause(problem: Exception) -> str:
    """An error in one line; of one in a worker process, what it was there."""
    lines = [line.rstrip() for line in str(problem).splitlines() if line.strip()]
    traces = [i for i, line in enumerate(lines) if line.startswith(("Original Traceback", "Traceback"))]
    for line in lines[traces[-1] + 1:] if traces else ():
        if not line.startswith(" "):
            return line
    return f"{type(problem).__name__}: {lines[0].strip()}" if lines else type(problem).__name__


def _drawn(dataloader, wanted: int, seed: int) -> _Source:
    """The loader itself, or a random part of the same images where that is known without loading them."""
    if isinstance(dataloader, Dataset) or not isinstance(dataloader, Iterable):
        remedy = "; give torch.utils.data.DataLoader(dataset, batch_size=64)" if hasattr(dataloader, "__getitem__") \
            else ""
        raise UserError(f"{one.WANTED}; seen: {type(dataloader).__name__}{remedy}")
    if isinstance(dataloader, (list, tuple)):
        order = torch.randperm(len(dataloader), generator=generator(seed, "sample")).tolist()
        return _Source([dataloader[i] for i in order], order)
    if not _map_style(dataloader):
        return _Source(dataloader)
    try:
        return _part(dataloader, wanted, seed)
    except Exception as problem:  # of the sampler, or the data set's length
        raise UserError(f"the dataloader's sampler failed: {_cause(problem)}. Iterating over the loader must work by "
                        "itself") from problem


def _part(dataloader: DataLoader, wanted: int, seed: int) -> _Source:
    """Random images of a map-style data set, of those that the loader's own sampler gives, each once."""
    most = max(len(dataloader.dataset), SEEN * wanted)
    indices = list(dict.fromkeys(islice(chain.from_iterable(dataloader.batch_sampler), most)))
    if all(isinstance(index, int) for index in indices):
        indices.sort()  # what is drawn depends on the seed alone, whether or not the loader shuffles
    order = torch.randperm(len(indices), generator=generator(seed, "sample"))[:wanted].tolist()
    chosen, size = [indices[i] for i in order], dataloader.batch_size or BATCH
    part = DataLoader(dataloader.dataset, size, sampler=chosen, collate_fn=dataloader.collate_fn,
                      num_workers=dataloader.num_workers, worker_init_fn=dataloader.worker_init_fn,
                      generator=generator(seed, "workers"), multiprocessing_context=dataloader.multiprocessing_context)
    return _Source(part, drawn=[chosen[start:start + size] for start in range(0, len(chosen), size)])


def _map_style(dataloader) -> bool:
    """Whether it is a plain DataLoader whose images have indices."""
    return isinstance(dataloader, DataLoader) and type(dataloader).__iter__ is DataLoader.__iter__ \
        and dataloader.batch_sampler is not None and not isinstance(dataloader.dataset, IterableDataset) \
        and hasattr(dataloader.dataset, "__len__") and hasattr(dataloader.dataset, "__getitem__")


def _reservoir(stream: Iterable[tuple[Tensor, Tensor]], wanted: int,
               random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A uniform sample of what a stream begins with (Vitter's algorithm R), and its labels.

    Args:
        stream: of images [n, C, H, W] and labels [n].
        wanted: images to keep; ``SEEN`` times as many are looked at.
        random: draws which image gives way.
    """
    room = min(wanted, ROOM)
    pixels, labels, seen = None, torch.empty(room, dtype=torch.long), 0
    for images, own in stream:
        if pixels is None:
            pixels = images.new_empty(room, *images.shape[1:])
        for image, label in zip(images, own):
            slot = _slot(seen, wanted, random)
            if slot is not None:
                if slot == len(pixels):
                    pixels, labels = _doubled(pixels, wanted), _doubled(labels, wanted)
                pixels[slot], labels[slot] = image, label
            seen += 1
        if seen >= SEEN * wanted:
            break
    if pixels is None:
        raise UserError("the dataloader is empty; give one that yields (images, labels)")
    return pixels[:seen], labels[:seen]


def _doubled(rows: Tensor, most: int) -> Tensor:
    """With room for as many rows again, but for ``most`` in all at most."""
    return torch.cat([rows, rows.new_empty(min(len(rows), most - len(rows)), *rows.shape[1:])])


def _slot(index: int, wanted: int, random: torch.Generator) -> int | None:
    """Where image ``index`` of a stream goes; None if it is not taken."""
    if index < wanted:
        return index
    slot = int(torch.randint(index + 1, (), generator=random))
    return slot if slot < wanted else None


def _permute(rows: Tensor, order: Tensor) -> None:
    """``rows[order]`` in place, along its cycles: images of ImageNet's size do not fit twice."""
    source, done = order.tolist(), [False] * len(order)
    for start in range(len(source)):
        if done[start] or source[start] == start:
            continue
        first, at = rows[start].clone(), start
        while source[at] != start:
            rows[at] = rows[source[at]]
            done[at], at = True, source[at]
        rows[at], done[at] = first, True

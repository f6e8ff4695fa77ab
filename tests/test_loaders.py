"""A user's loader: a bounded random sample of it, with all classes in every part, or one sentence that says why not."""

import collections
import random
import re

import numpy as np
import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from hobs_rspar import loaders
from hobs_rspar.batches import check_range, tensors
from hobs_rspar.errors import UserError
from hobs_rspar.seeds import generator


class Numbered(Dataset):
    """Image i is full of i, sorted by class (``each`` images of one after the other), and counts what is asked for."""

    def __init__(self, count: int, each: int = 10, noise: bool = False):
        self.count, self.each, self.noise, self.asked = count, each, noise, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.asked.append(index)
        return torch.full((1, 2, 2), float(index)) + self.noise * torch.rand(1, 2, 2), index // self.each


def numbers(images) -> list[int]:
    return images.pixels[:, 0, 0, 0].long().tolist()


def stream(count: int, size: int = 5, each: int = 10):
    for start in range(0, count, size):
        index = torch.arange(start, min(start + size, count))
        yield index.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), index // each


# --- what is taken

def test_a_map_style_data_set_gives_random_images_and_decodes_no_other():
    data = Numbered(1000)
    found = loaders.sample(DataLoader(data, 16), 64, seed=3)
    assert len(found) == len(data.asked) == 64 and sorted(numbers(found)) == sorted(data.asked)
    assert len(set(data.asked)) == 64 and max(data.asked) > 800  # not the first ones
    assert found.labels.tolist() == [number // 10 for number in numbers(found)]
    assert numbers(loaders.sample(DataLoader(data, 16), 64, seed=4)) != numbers(found)


@pytest.mark.parametrize("make", [
    lambda data: DataLoader(data, 16, shuffle=True), lambda data: DataLoader(data, 7),
    lambda data: DataLoader(data, batch_sampler=BatchSampler(range(len(data)), 9, False)),
    lambda data: DataLoader(data, 16, num_workers=1),
])
def test_what_is_drawn_depends_on_the_seed_alone(make):
    data = Numbered(300, noise=True)
    wanted, torch_state = loaders.sample(DataLoader(data, 16), 40, seed=1), torch.get_rng_state()
    torch.manual_seed(random.randrange(1000))
    before = torch.get_rng_state()
    found = loaders.sample(make(data), 40, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on as they were
    assert numbers(found) == numbers(wanted)
    torch.set_rng_state(torch_state)


def test_a_transforms_random_numbers_are_seeded_too():
    one, same = (loaders.sample(DataLoader(Numbered(50, noise=True), 8), 20, seed=1) for _ in range(2))
    assert torch.equal(one.pixels, same.pixels)


def test_only_the_samplers_own_images_are_drawn():
    own = list(range(5, 300, 7))
    found = loaders.sample(DataLoader(Numbered(300), 4, sampler=SubsetRandomSampler(own)), 1000)
    assert sorted(numbers(found)) == own
    few = loaders.sample(DataLoader(Numbered(300), 4, sampler=SubsetRandomSampler(own)), 10)
    assert len(few) == 10 and set(numbers(few)) <= set(own)


def test_an_endless_sampler_ends():
    class Endless:
        def __iter__(self):
            while True:
                yield random.randrange(30)

    assert len(loaders.sample(DataLoader(Numbered(30), 4, sampler=Endless()), 12)) == 12


def test_an_endless_stream_is_read_a_bounded_time():
    read = []

    def endless():
        while True:
            read.append(1)
            yield torch.zeros(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)

    assert len(loaders.sample(endless(), 10)) == 10 and len(read) == -(-loaders.SEEN * 10 // 6)


class Flow(IterableDataset):
    def __iter__(self):
        return iter(Numbered(40))


@pytest.mark.parametrize("make", [lambda: list(stream(40)), lambda: stream(40), lambda: DataLoader(Flow(), 8)])
def test_lists_and_streams_are_sampled_everywhere(make):
    """Every image with the same probability: 300 samples of 8 of 40 hold each 60 times, give or take 6.9."""
    taken = collections.Counter(number for seed in range(300) for number in numbers(loaders.sample(make(), 10, seed)))
    expected = 300 * 10 / 40
    assert len(taken) == 40 and all(abs(count - expected) < 5 * expected**0.5 for count in taken.values())


def test_all_of_a_small_loader_is_taken_once():
    assert sorted(numbers(loaders.sample(stream(23), 100))) == list(range(23))
    assert sorted(numbers(loaders.sample(list(stream(23)), 23))) == list(range(23))


@pytest.mark.parametrize("count", [8, 20, 57])
def test_every_part_from_the_start_holds_all_classes(count):
    labels = torch.arange(100) // 25
    order = loaders.stratified(labels, generator(0, "test"))
    assert sorted(order.tolist()) == list(range(100))
    seen = labels[order[:count]].bincount(minlength=4)
    assert seen.min() >= count // 4 - 1 and seen.max() <= -(-count // 4) + 1
    other = loaders.stratified(labels, generator(1, "test"))
    assert not torch.equal(order, other)


def test_a_loader_sorted_by_class_gives_both_halves_the_same_classes():
    found = loaders.sample(DataLoader(Numbered(500, each=50), 32), 200)
    halves = [part.bincount(minlength=10) for part in found.labels.split(100)]
    assert (halves[0] - halves[1]).abs().max() <= 1


def test_rows_are_permuted_in_place():
    rows = torch.arange(24.0).view(12, 2)
    for seed in range(5):
        order = torch.randperm(12, generator=generator(seed, "test"))
        moved = rows.clone()
        loaders._permute(moved, order)
        assert torch.equal(moved, rows[order])


def test_batches_of_a_map_style_loader_are_random_ones_for_the_analyzer():
    data = Numbered(400)
    found, size = loaders.from_loader(DataLoader(data, 20), 3)
    assert size == 20 and len(found) == len(data.asked) == 60 and max(data.asked) > 200


# --- what a batch may be

IMAGES, LABELS = torch.rand(4, 3, 2, 2), torch.tensor([0, 2, 1, 3])
Pair = collections.namedtuple("Pair", "images labels")


@pytest.mark.parametrize("batch", [
    (IMAGES, LABELS), [IMAGES, LABELS], Pair(IMAGES, LABELS), {"image": IMAGES, "label": LABELS},
    {"pixel_values": IMAGES, "labels": LABELS, "path": ["a"] * 4}, collections.UserDict(img=IMAGES, target=LABELS),
    (IMAGES.numpy(), LABELS.numpy()), (IMAGES.double(), LABELS.tolist()), (list(IMAGES), list(LABELS)),
    ([image.numpy() for image in IMAGES], LABELS.to(torch.uint8)), (IMAGES, LABELS.float()),
    (IMAGES, LABELS.numpy().astype(np.uint16)), (IMAGES.clone().requires_grad_(), LABELS),
])
def test_batches_of_many_kinds_are_taken(batch):
    images, labels = tensors(batch, "batch 0")
    assert images.dtype == torch.float32 and torch.equal(images, IMAGES) and not images.requires_grad
    assert labels.dtype == torch.int64 and torch.equal(labels, LABELS)


NAN = IMAGES.clone()
NAN[2, 0, 1, 1] = torch.nan


@pytest.mark.parametrize(("batch", "words"), [
    (IMAGES, "must yield .* it yields Tensor. A single batch must stand in a list"),
    ((IMAGES, LABELS, LABELS), "it yields tuples of 3: leave the other parts out"),
    ({"image": IMAGES, "y": LABELS}, "it yields dict with image, y, which needs one of .* and one of label"),
    ({"image": IMAGES, "img": IMAGES, "label": LABELS}, "it yields dict with image, img, label"),
    ((["a.png", "b.png"], [0, 1]), "the images of batch 7 are str objects: make them tensors"),
    (("a.png", 0), "it yields str where the images should be"),
    (([IMAGES[0], IMAGES[1, :, :1]], [0, 1]), r"images of different shapes, \[3, 2, 2\] and \[3, 1, 2\]; resize"),
    ((IMAGES[:, 0], LABELS), r"images of shape \[4, 2, 2\] \(batch 7\); add the channels, images\[:, None\]"),
    ((IMAGES[0], 1), r"images of shape \[3, 2, 2\] \(batch 7\); give whole batches"),
    ((IMAGES.flatten(1), LABELS), r"images of shape \[4, 12\]"),
    (((IMAGES * 255).to(torch.uint8), LABELS), "images of batch 7 are uint8; give float images, scaled and normalised"),
    ((IMAGES.to(torch.complex64), LABELS), "are complex64"), ((IMAGES[:0], LABELS[:0]), "batch 7 is empty"),
    ((NAN, LABELS), r"image 2 of batch 7 \(from 0\) holds NaN or infinity"),
    ((IMAGES / 0, LABELS), r"image 0 of batch 7 \(from 0\) holds NaN"),
    ((IMAGES, LABELS[:, None]), r"labels of batch 7 have shape \[4, 1\]; .* give labels\[:, 0\]"),
    ((IMAGES, torch.eye(4)), r"labels of batch 7 have shape \[4, 4\]; .* give labels.argmax\(1\), if they are one-hot"),
    ((IMAGES, LABELS[:3]), "batch 7 has 4 images and 3 labels"),
    ((IMAGES, LABELS + 0.5), "a label of batch 7 is 0.5; labels must be whole numbers"),
    ((IMAGES, LABELS * torch.nan), "a label of batch 7 is nan"),
    ((IMAGES, LABELS / 0), "a label of batch 7 is (nan|inf)"), ((IMAGES, LABELS + 1e30), "a label of batch 7 is 1e"),
    ((IMAGES.to_sparse(), LABELS), "without plain values .sparse, nested, or on the meta device.: give dense"),
    ((IMAGES.to("meta"), LABELS), "without plain values"), ((IMAGES, LABELS.to("meta")), "without plain values"),
    ((IMAGES, ["cat", "dog", "cat", "cow"]), "the labels of batch 7 are str objects"), ((IMAGES, None), "NoneType"),
])
def test_other_batches_are_refused(batch, words):
    with pytest.raises(UserError, match=words) as seen:
        tensors(batch, "batch 7")
    assert "\n" not in str(seen.value)


def test_all_images_of_a_stream_may_be_asked_for_by_a_large_number(monkeypatch):
    monkeypatch.setattr(loaders, "ROOM", 2)
    found = loaders.sample([(IMAGES, LABELS), (IMAGES, LABELS)], 10**12, 0)
    assert sorted(found.labels.tolist()) == sorted([*LABELS.tolist(), *LABELS.tolist()])
    assert torch.allclose(found.pixels.sum(), 2 * IMAGES.sum())


@pytest.mark.parametrize(("labels", "words"), [
    ([0, -1, 2], r"a label is -1; labels are classes 0 to 3: leave"), ([1, 2, 9], "a label is 9, and .* 4 outputs"),
    ([1, 4, 2], "they seem to begin at 1"), ([0, 255], "a label is 255"),
])
def test_labels_must_be_classes_of_the_network(labels, words):
    check_range(torch.tensor([0, 3]), 4)
    with pytest.raises(UserError, match=words):
        check_range(torch.tensor(labels), 4)


class Failing(Numbered):
    def __getitem__(self, index: int):
        if index == 33:
            raise OSError("33.jpg: truncated\nsecond line")
        return super().__getitem__(index)


def failing():
    yield from stream(10)
    raise ValueError("disk gone")


POISONED = TensorDataset(torch.ones(40, 1, 2, 2).index_fill(0, torch.tensor([17]), torch.inf), torch.zeros(40).long())


@pytest.mark.parametrize(("loader", "words"), [
    ([], "the dataloader is empty"), (DataLoader(Flow(), 8, collate_fn=lambda batch: 1 / 0), "ZeroDivisionError"),
    (iter([]), "the dataloader is empty"), (5, "must yield .*; seen: int"),
    (Numbered(9), r"seen: Numbered; give torch.utils.data.DataLoader\(dataset, batch_size=64\)"),
    (IMAGES, "it yields Tensor|it yields"), ((IMAGES, LABELS), "it yields Tensor. A single batch must stand in a list"),
    (failing(), "the dataloader failed at batch 2: ValueError: disk gone. Iterating over it must work by itself"),
    (DataLoader(Failing(40), 8), r"failed at the batch of the data set's images .*: OSError: 33.jpg: truncated\. "),
    ([(IMAGES, LABELS), (IMAGES[..., :1], LABELS)], r"the images of batch \d have shape .*, those of other batches"),
    (DataLoader(POISONED, 8), "image 17 of the data set holds NaN or infinity"),
    (DataLoader(POISONED, 8, collate_fn=lambda rows: (torch.stack([rows[0][0] / 0]), [0])), "image 0 of the batch of "),
])
def test_loaders_that_fail_say_where_and_why(loader, words):
    with pytest.raises(UserError, match=words) as seen:
        loaders.sample(loader, 64)
    assert not re.search(r"\n|Traceback", str(seen.value))


def test_an_error_of_a_worker_is_told_in_its_own_words():
    """As PyTorch brings it from a worker process: with a traceback in its text."""
    def from_a_worker():
        yield from stream(10)
        try:
            Failing(40)[33]
        except OSError:
            ExceptionWrapper(where="in DataLoader worker process 0").reraise()

    with pytest.raises(UserError, match=r"failed at batch 2: OSError: 33.jpg: truncated\. Iterating"):
        loaders.sample(from_a_worker(), 64)

"""Sources, splits and images in memory, on files that the tests make."""

import gzip
import hashlib
import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from hobs_rspar import data, sources
from hobs_rspar.checkpoint import digest
from hobs_rspar.data import Raw, split_and_save
from hobs_rspar.errors import UserError
from hobs_rspar.loaders import from_loader
from small import images


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"folder": None, "validation": 20, "calibration": 10, "train_images": None,
                              "test_images": None, "image_size": None, "split_seed": 0} | changes)


def raw(count: int = 100, channels: int = 1) -> Raw:
    """Images that carry their own number, so that every split can be traced."""
    numbers = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(count, channels, 4, 4).clone()
    tests = torch.full((30, channels, 4, 4), 255, dtype=torch.uint8)
    return Raw(numbers, torch.arange(count) % 10, tests, torch.arange(30) % 10, [str(c) for c in range(10)], "test")


def numbers(split: data.Images) -> list[int]:
    return split.pixels[:, 0, 0, 0].tolist()


# --- splits

def test_splits_are_disjoint_and_complete(tmp_path):
    manifest = split_and_save(raw(), "fashion_mnist", options(), tmp_path)
    parts = {name: data.load(tmp_path, name) for name in data.SPLITS}
    assert {name: len(part) for name, part in parts.items()} == manifest["images"] == \
        {"train": 70, "calibration": 10, "validation": 20, "test": 30}
    trained = [numbers(parts[name]) for name in ("train", "calibration", "validation")]
    assert sorted(sum(trained, [])) == list(range(100))
    assert trained[0] != sorted(trained[0])  # shuffled
    for part in (parts["train"], parts["validation"]):
        assert part.labels.tolist() == [number % 10 for number in numbers(part)] and part.labels.dtype == torch.int64
    assert set(numbers(parts["test"])) == {255}


def test_splits_are_the_same_bytes_every_time(tmp_path):
    for name in ("first", "second"):
        split_and_save(raw(), "fashion_mnist", options(), tmp_path / name)
    split_and_save(raw(), "fashion_mnist", options(split_seed=1), tmp_path / "other")
    for name in data.SPLITS:
        assert digest(tmp_path / "first" / f"{name}.safetensors") == digest(tmp_path / "second" / f"{name}.safetensors")
    texts = [(tmp_path / name / "manifest.json").read_text() for name in ("first", "second", "other")]
    assert texts[0] == texts[1] != texts[2]
    assert digest(tmp_path / "first/train.safetensors") != digest(tmp_path / "other/train.safetensors")
    assert digest(tmp_path / "first/test.safetensors") == digest(tmp_path / "other/test.safetensors")


def test_manifest(tmp_path):
    written = split_and_save(raw(channels=3), "cifar10", options(), tmp_path)
    found = data.manifest(tmp_path)
    assert found == written == json.loads((tmp_path / "manifest.json").read_text())
    assert found["image_shape"] == [3, 4, 4] and found["dataset"] == "cifar10" and len(found["classes"]) == 10
    assert found["sha256"] == {name: digest(tmp_path / f"{name}.safetensors") for name in data.SPLITS}
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    assert found["order_sha256"] == hashlib.sha256(order.numpy().tobytes()).hexdigest()
    assert numbers(data.load(tmp_path, "validation")) == order[:20].tolist()


def test_fewer_images_are_a_prefix(tmp_path):
    split_and_save(raw(), "fashion_mnist", options(), tmp_path / "all")
    split_and_save(raw(), "fashion_mnist", options(train_images=13, test_images=7), tmp_path / "few")
    assert numbers(data.load(tmp_path / "few", "train")) == numbers(data.load(tmp_path / "all", "train"))[:13]
    assert numbers(data.load(tmp_path / "few", "validation")) == numbers(data.load(tmp_path / "all", "validation"))
    assert len(data.load(tmp_path / "few", "test")) == 7


def test_a_part_of_the_test_images_is_a_random_one(tmp_path):
    """Image folders are sorted by class: the first of them are of one class."""
    pixels, labels = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(60, 1, 4, 4), torch.arange(60) // 20
    by_class = Raw(pixels, labels, pixels, labels, ["a", "b", "c"], "test")
    taken = {}
    for name, changes in {"all": {}, "as many": {"test_images": 60}, "part": {"test_images": 12},
                          "again": {"test_images": 12}, "other": {"test_images": 12, "split_seed": 1}}.items():
        written = split_and_save(by_class, "fashion_mnist", options(**changes), tmp_path / name)
        split = data.load(tmp_path / name, "test")
        taken[name] = numbers(split)
        assert split.labels.tolist() == [number // 20 for number in taken[name]]
        assert written["images"]["test"] == len(split)
    assert taken["all"] == taken["as many"] == list(range(60))
    assert taken["part"] == torch.randperm(60, generator=torch.Generator().manual_seed(0))[:12].tolist()
    assert taken["part"] == taken["again"] != taken["other"] and {number // 20 for number in taken["part"]} == {0, 1, 2}


def test_too_few_images_for_the_splits(tmp_path):
    with pytest.raises(UserError, match="data.validation . data.calibration = 100 images, but .* has only 100"):
        split_and_save(raw(), "fashion_mnist", options(validation=90), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- images

def test_normalisation():
    mean, std = torch.tensor([0.2, 0.5]), torch.tensor([0.25, 0.1])
    pixels = torch.randint(0, 256, (5, 2, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Images(pixels, torch.arange(5), mean, std)
    wanted = (pixels / 255 - mean.view(1, 2, 1, 1)) / std.view(1, 2, 1, 1)
    seen = split.normalised(pixels)
    assert torch.allclose(seen, wanted, atol=1e-5) and seen.dtype == torch.float32
    assert seen.is_contiguous(memory_format=torch.channels_last)
    parts = list(split.batches(2))
    assert [len(x) for x, _ in parts] == [2, 2, 1] and torch.equal(torch.cat([x for x, _ in parts]), seen)
    assert torch.cat([labels for _, labels in parts]).tolist() == [0, 1, 2, 3, 4]
    assert split.first(3).labels.tolist() == [0, 1, 2] and len(split.first(99)) == 5


def test_constants_of_the_data_sets(tmp_path):
    for name, (mean, std) in data.NORMALISATION.items():
        split_and_save(raw(channels=len(mean)), name, options(), tmp_path / name)
        split = data.load(tmp_path / name, "train")
        assert split.mean.tolist() == pytest.approx(mean) and split.std.tolist() == pytest.approx(std)


# --- Fashion-MNIST's files

def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Four small files in the format, and their checksums in place of the real ones."""
    random = np.random.default_rng(0)
    arrays = {"train-images-idx3-ubyte": random.integers(0, 256, (40, 28, 28)),
              "train-labels-idx1-ubyte": random.integers(0, 10, 40),
              "t10k-images-idx3-ubyte": random.integers(0, 256, (12, 28, 28)),
              "t10k-labels-idx1-ubyte": random.integers(0, 10, 12)}
    monkeypatch.setattr(sources, "FASHION_MNIST", {name: hashlib.sha256(idx(array)).hexdigest()
                                                   for name, array in arrays.items()})
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path, arrays


def test_idx_files_are_read(files):
    folder, arrays = files
    found = sources.read("fashion_mnist", options(folder=str(folder)))
    assert found.train_pixels.shape == (40, 1, 28, 28) and found.train_pixels.dtype == torch.uint8
    assert (found.train_pixels[:, 0].numpy() == arrays["train-images-idx3-ubyte"]).all()
    assert (found.test_labels.numpy() == arrays["t10k-labels-idx1-ubyte"]).all()
    assert found.train_labels.dtype == torch.int64 and found.test_pixels.shape == (12, 1, 28, 28)
    assert found.classes[0] == "T-shirt/top" and len(found.classes) == 10 and str(folder) in found.source


def test_unpacked_files_are_read_alike(files):
    folder, arrays = files
    packed = sources.fashion_mnist(str(folder))
    for name, array in arrays.items():
        (folder / f"{name}.gz").unlink()
        (folder / name).write_bytes(idx(array))
    unpacked = sources.fashion_mnist(str(folder))
    assert torch.equal(packed.train_pixels, unpacked.train_pixels)
    assert torch.equal(packed.test_labels, unpacked.test_labels)


def test_the_sources_are_tried_in_turn(files, monkeypatch, tmp_path):
    folder, _ = files
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", str(folder).lstrip("/"))
    assert sources.fashion_mnist(None).source == "Debian package dataset-fashion-mnist"  # installed
    monkeypatch.setattr(sources, "DEBIAN_FOLDER", "no/such/folder")
    monkeypatch.setattr(sources, "_from_debian", lambda scratch: folder)
    assert "Debian" in sources.fashion_mnist(None).source

    def missing(scratch):
        raise OSError("no network here")

    monkeypatch.setattr(sources, "_from_debian", missing)
    monkeypatch.setattr(sources, "_from_torchvision", lambda scratch: folder)
    assert sources.fashion_mnist(None).source == "torchvision"
    monkeypatch.setattr(sources, "_from_torchvision", missing)
    with pytest.raises(UserError, match=r"could not be fetched. Tried Debian package .*: no network here; torchvision: "
                                        r"no network here. Download its four files and set data.folder"):
        sources.fashion_mnist(None)


# --- CIFAR

@pytest.mark.filterwarnings("ignore")
def test_cifar_needs_its_folder(tmp_path):
    with pytest.raises(UserError, match=rf"cifar10 not found or damaged in '{tmp_path}' .*Set data.folder in "
                                        "params.yaml to the folder that holds 'cifar-10-batches-py'"):
        sources.read("cifar10", options(folder=str(tmp_path)))


# --- image folders

def write_images(folder, part: str, classes=("cat", "dog"), each: int = 3, size=(40, 30)) -> None:
    for number, name in enumerate(classes):
        (folder / part / name).mkdir(parents=True)
        for i in range(each):
            colour = np.zeros((size[1], size[0], 3), np.uint8)
            colour[..., number] = 100 + 10 * i
            Image.fromarray(colour).save(folder / part / name / f"{i}.png")


def test_image_folder(tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "val", each=2)
    grey = Image.fromarray(np.full((30, 40), 77, np.uint8))
    grey.save(tmp_path / "train/cat/3.png")
    found = sources.read("image_folder", options(folder=str(tmp_path), image_size=16))
    assert found.train_pixels.shape == (7, 3, 16, 16) and found.test_pixels.shape == (4, 3, 16, 16)
    assert found.train_pixels.dtype == torch.uint8 and found.classes == ["cat", "dog"]
    assert found.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1] and found.test_labels.tolist() == [0, 0, 1, 1]
    assert found.train_pixels[1].amax((1, 2)).tolist() == [110, 0, 0]  # channel 0 is the cats' colour
    assert found.test_pixels[3].amax((1, 2)).tolist() == [0, 110, 0]
    assert set(found.train_pixels[3].unique().tolist()) == {77}
    split = split_and_save(found, "image_folder", options(validation=2, calibration=1), tmp_path / "out")
    assert split["images"]["train"] == 4


def test_image_folder_needs_its_options(tmp_path):
    for changes in ({"folder": str(tmp_path)}, {"image_size": 32}):
        with pytest.raises(UserError, match="image_folder needs data.folder .* and data.image_size"):
            sources.read("image_folder", options(**changes))
    with pytest.raises(UserError, match=rf"data.folder '{tmp_path}': there is no folder {tmp_path}/train. "
                                        "Expected train/<class>/ and val/<class>/"):
        sources.read("image_folder", options(folder=str(tmp_path), image_size=16))


def test_images_that_do_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    write_images(tmp_path, "train")
    write_images(tmp_path, "val", each=2)
    monkeypatch.setattr(sources, "_stacked", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UserError, match="10 images of 40000 pixels need 45 GiB, the limit is 8; lower data.image_size"):
        sources.read("image_folder", options(folder=str(tmp_path), image_size=40_000))


def test_image_folder_with_other_classes_in_val_is_refused(tmp_path):
    write_images(tmp_path, "train", ("cat", "dog", "eel"))
    write_images(tmp_path, "val", ("cat", "eel"))
    with pytest.raises(UserError, match="dog"):
        sources.read("image_folder", options(folder=str(tmp_path), image_size=16))


def test_every_damaged_image_is_named(tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "val")
    path = tmp_path / "train/dog/1.png"
    path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "val/cat/0.png").write_text("no image")
    (tmp_path / "val/dog/2.png").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        sources.read("image_folder", options(folder=str(tmp_path), image_size=16))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"data.folder '{tmp_path}': files that cannot be read as images: 3; convert, "\
        "replace or remove them:"
    assert [name in line for name, line in zip(("train/dog/1.png", "val/cat/0.png", "val/dog/2.png"), lines[1:])] == \
        [True] * 3 and len(lines) == 4


def pixel(image: Image.Image, tmp_path, name: str = "image.png", **saved) -> list[int]:
    """What the left upper pixel of an image becomes in a split: red, green, blue."""
    image.save(tmp_path / name, **saved)
    return list(sources.Reader(1)(str(tmp_path / name)).getpixel((0, 0)))


def grey(value: int, kind=np.uint16) -> Image.Image:
    return Image.fromarray(np.full((6, 8), value, kind))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
@pytest.mark.parametrize(("value", "wanted"), [(0, 0), (30000, 117), (65535, 255), (129, 1), (128, 0)])
def test_grey_of_sixteen_bits_is_scaled(name, value, wanted, tmp_path):
    assert pixel(grey(value), tmp_path, name) == [wanted] * 3


def test_grey_of_twelve_bits_is_scaled(tmp_path):
    """A TIFF file's own tag says how many bits there are."""
    packed = bytes([0x80, 0x08, 0x00]) * 24  # 2048, 2048 and so on
    Image.frombytes("L", (72, 1), packed).save(tmp_path / "raw.tif")
    path, text = tmp_path / "a.tif", (tmp_path / "raw.tif").read_bytes()
    path.write_bytes(retagged(text, {256: 8, 257: 6, 258: 12, 278: 6}))
    assert list(sources.Reader(1)(str(path)).getpixel((0, 0))) == [128] * 3


def retagged(tiff: bytes, values: dict[int, int]) -> bytes:
    """A little-endian TIFF file with other short or long values of some tags."""
    out, start = bytearray(tiff), struct.unpack("<I", tiff[4:8])[0]
    for entry in range(start + 2, start + 2 + 12 * struct.unpack("<H", tiff[start:start + 2])[0], 12):
        tag, kind = struct.unpack("<HH", tiff[entry:entry + 4])
        if tag in values:
            out[entry + 8:entry + 12] = struct.pack("<I", values[tag]) if kind == 4 else \
                struct.pack("<HH", values[tag], 0)
    return bytes(out)


@pytest.mark.parametrize(("image", "said"), [(grey(3, np.int32), "mode I"), (grey(70000, np.int32), "mode I"),
                                             (grey(0.5, np.float32), "mode F")])
def test_images_without_a_known_white_are_refused(image, said, tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "val")
    image.save(tmp_path / "val/cat/odd.tif")
    with pytest.raises(UserError, match=rf"cannot be read as images: 1; .*\n.*val/cat/odd.tif: {said} .*no value "
                                        "is known to be white; allowed are 1, 8 and 16 bits, grey or colour: scale it"):
        sources.read("image_folder", options(folder=str(tmp_path), image_size=16))


def test_every_kind_of_image_becomes_the_colours_that_it_shows(tmp_path):
    colour = Image.new("RGB", (8, 6), (255, 0, 51))
    assert pixel(colour, tmp_path) == [255, 0, 51]
    assert pixel(colour.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path) == [255, 0, 51]
    assert pixel(Image.new("1", (8, 6), 1), tmp_path) == [255] * 3
    assert pixel(Image.new("L", (8, 6), 77), tmp_path) == [77] * 3
    assert pixel(Image.new("CMYK", (8, 6), (0, 255, 204, 0)), tmp_path, "a.tif") == [255, 0, 51]
    assert pixel(Image.new("RGBA", (8, 6), (255, 0, 51, 255)), tmp_path) == [255, 0, 51]
    assert pixel(Image.new("RGBA", (8, 6), (255, 0, 51, 0)), tmp_path) == [255, 255, 255]  # nothing is seen of it
    assert pixel(Image.new("RGBA", (8, 6), (0, 0, 0, 51)), tmp_path) == [204] * 3
    assert pixel(Image.new("LA", (8, 6), (0, 51)), tmp_path) == [204] * 3
    clear = Image.new("P", (8, 6), 1)
    clear.putpalette([255, 0, 51, 9, 9, 9])
    assert pixel(clear, tmp_path, transparency=1) == [255, 255, 255]


def test_the_cameras_orientation_is_applied(tmp_path):
    picture = Image.new("RGB", (8, 6))
    picture.putpixel((7, 0), (255, 0, 51))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter, against the clock: the right upper pixel becomes the left upper one
    assert pixel(picture, tmp_path, exif=exif) == [255, 0, 51] and pixel(picture, tmp_path) == [0, 0, 0]
    assert pixel(Image.fromarray(np.eye(8, dtype=np.uint16)[::-1] * 65535), tmp_path, exif=exif) == [255] * 3


def test_what_was_decided_about_images_is_said(tmp_path):
    write_images(tmp_path, "train")
    write_images(tmp_path, "val")
    Image.new("RGBA", (8, 40)).save(tmp_path / "val/cat/clear.png")
    grey(30000).save(tmp_path / "train/dog/xray.tif", save_all=True, append_images=[grey(0)])
    for path in (".ipynb_checkpoints/0.png", "cat/._0.png", "cat/notes.txt"):
        (tmp_path / "train" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / path).write_text("")
    found = sources.read("image_folder", options(folder=str(tmp_path), image_size=16))
    assert found.classes == ["cat", "dog"] and len(found.train_pixels) == 7 and len(found.test_pixels) == 7
    assert sorted(found.notes) == sorted([
        "images in grey of more than 8 bits, scaled to 8: 1", "images smaller than data.image_size, enlarged: 2",
        "images of several pages, of which the first was taken: 1",
        "images with transparent pixels, which became white: 1",
        f"files in {tmp_path}/train left out (hidden, or no images by their ending: .png, .txt): 3"])


# --- a user's loader

def test_a_loader_becomes_images_as_they_are():
    source = images(10)
    x = source.normalised(source.pixels).contiguous()
    found, size = from_loader([(x[:4], source.labels[:4]), (x[4:8], source.labels[4:8]), (x[8:], source.labels[8:])])
    assert size == 4 and len(found) == 10
    assert torch.equal(found.normalised(found.pixels), x)  # to the bit
    assert torch.equal(found.labels, source.labels)
    few, _ = from_loader(iter([(x[:4], source.labels[:4]), (x[4:], source.labels[4:])]), batches=1)
    assert len(few) == 4


@pytest.mark.parametrize(("loader", "message"), [
    ([], "the dataloader is empty; give one that yields"),
    ([torch.zeros(2, 1, 4, 4)], r"must yield \(images \[n, C, H, W\], labels \[n\]\); it yields Tensor"),
    ([(torch.zeros(2, 16), torch.zeros(2))], "it yields tuple"),
    ([{"image": 0}], "it yields dict"),
])
def test_other_loaders_are_refused(loader, message):
    with pytest.raises(UserError, match=message):
        from_loader(loader)

"""Splits of a data set as tensors in memory: training images are split once, by a fixed and stored manifest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hobs_rspar.checkpoint import digest, load_tensors, save_tensors
from hobs_rspar.errors import UserError

SPLITS = ("train", "calibration", "validation", "test")
# Mean and standard deviation of the training images, per channel, as the field normalises them.
NORMALISATION = {
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "image_folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Images:
    """A split in memory.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N].
        mean: per channel, of pixels scaled to [0, 1].
        std: likewise.
        layout: of normalised images; channels_last is faster, a user's network may need another.
    """

    pixels: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    layout: torch.memory_format = torch.channels_last

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("pixels", "labels", "mean", "std")})

    def first(self, count: int) -> Images:
        """The first ``count`` images: a random sample of train, calibration and validation, which are shuffled.

        A test split of all test images keeps the source's order; one of a part of them is shuffled first.
        """
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels [n, C, H, W] as normalised float32 in ``layout``."""
        scale = (1 / (255 * self.std)).view(1, -1, 1, 1)
        shift = (-self.mean / self.std).view(1, -1, 1, 1)
        return torch.addcmul(shift, pixels.float(), scale).contiguous(memory_format=self.layout)

    def batches(self, size: int):
        """Yields (normalised images, labels) in order."""
        for start in range(0, len(self), size):
            yield self.normalised(self.pixels[start:start + size]), self.labels[start:start + size]


@dataclass(frozen=True)
class Raw:
    """What a source gives: all training and test images, and the names of the classes.

    Attributes:
        source: where the files were found.
        notes: what was done to the images that a person should know of, a sentence each.
    """

    train_pixels: Tensor
    train_labels: Tensor
    test_pixels: Tensor
    test_labels: Tensor
    classes: list[str]
    source: str
    notes: tuple[str, ...] = ()


def split_and_save(raw: Raw, dataset: str, options, folder: Path) -> dict:
    """Splits the training images into train, calibration and validation, and writes all splits and the manifest.

    Args:
        raw: all images.
        dataset: its name, for the normalisation.
        options: ``params.data``.
        folder: where to write; ``<split>.safetensors`` and ``manifest.json``.

    Returns:
        The manifest.

    Raises:
        UserError: the splits need more images than there are.
    """
    total = len(raw.train_labels)
    left = left_for_training(total, dataset, options)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(options.split_seed))
    validation, calibration, train = order.split([options.validation, options.calibration, left])
    train = train[:options.train_images]
    parts = {"train": train, "calibration": calibration, "validation": validation}
    mean, std = (torch.tensor(values) for values in NORMALISATION[dataset])
    for name, index in parts.items():
        _save(folder, name, Images(raw.train_pixels[index], raw.train_labels[index], mean, std))
    tested = _tested(len(raw.test_labels), options)
    test = Images(raw.test_pixels[tested], raw.test_labels[tested], mean, std)
    _save(folder, "test", test)
    manifest = {
        "dataset": dataset, "classes": raw.classes, "image_shape": list(raw.train_pixels.shape[1:]),
        "images": {**{name: len(index) for name, index in parts.items()}, "test": len(test)},
        "sha256": {name: digest(folder / f"{name}.safetensors") for name in SPLITS},
        "order_sha256": hashlib.sha256(order.numpy().tobytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def left_for_training(total: int, dataset: str, options) -> int:
    """How many of ``total`` training images validation and calibration leave.

    Raises:
        UserError: validation and calibration leave none.
    """
    held_out = options.validation + options.calibration
    if held_out >= total:
        raise UserError(f"params.yaml: data.validation + data.calibration = {held_out} images, but {dataset} has only "
                        f"{total} training images; lower them")
    return total - held_out


def _tested(total: int, options) -> Tensor | slice:
    """Which test images are used; a part of them is a random one, because an image folder is sorted by class."""
    if options.test_images is None or options.test_images >= total:
        return slice(None)
    generator = torch.Generator().manual_seed(options.split_seed)
    return torch.randperm(total, generator=generator)[:options.test_images]


def _save(folder: Path, name: str, images: Images) -> None:
    save_tensors(folder / f"{name}.safetensors", {"pixels": images.pixels.contiguous(), "labels": images.labels.long(),
                                                  "mean": images.mean, "std": images.std})


def load(folder: Path | str, split: str, device: torch.device | str = "cpu") -> Images:
    """A split as tensors on ``device``.

    Raises:
        UserError: the file is missing or unreadable.
    """
    tensors, _ = load_tensors(Path(folder) / f"{split}.safetensors")
    return Images(tensors["pixels"], tensors["labels"], tensors["mean"], tensors["std"]).to(torch.device(device))


def manifest(folder: Path | str) -> dict:
    """The data set's manifest."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path} not found; run 'dvc repro data'")
    return json.loads(path.read_text())


def random_crops(pixels: Tensor, size: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops (and horizontal flips) of a batch, gathered by index: no loop over images.

    Args:
        pixels: [n, C, H, W].
        size: edge of the crop. A crop of the full size is taken from the image padded by a twelfth of black pixels;
            a smaller one from the image itself.
        flip: mirror half of the images.
        generator: CPU generator of the offsets.

    Returns:
        [n, C, size, size].

    Raises:
        UserError: the crop is larger than the padded image.
    """
    count, channels, height, _ = pixels.shape
    pad = max(1, height // 12) if size >= height else 0
    if pad:
        pixels = torch.nn.functional.pad(pixels, (pad, pad, pad, pad))
    span = pixels.shape[-1] - size + 1
    if span < 1:
        raise UserError(f"params.yaml: crops: {size} pixels are more than the image has ({height}, "
                        f"{pixels.shape[-1]} with its padding); lower it")
    top, left = (torch.randint(span, (count, 1), generator=generator) for _ in range(2))
    steps = torch.arange(size)
    rows, columns = top + steps, left + steps
    if flip:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = (rows[:, :, None] * pixels.shape[-1] + columns[:, None, :]).view(count, 1, -1).to(pixels.device)
    return pixels.flatten(2).gather(2, index.expand(-1, channels, -1)).view(count, channels, size, size)

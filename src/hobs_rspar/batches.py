"""One batch of a user's loader as tensors, images [n, C, H, W] and labels [n], or one sentence that says why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.errors import UserError

LARGEST = 2**31  # label; what float numbers beyond it become as whole ones is not what they say
WANTED = "the dataloader must yield (images [n, C, H, W], labels [n])"
IMAGES = ("image", "images", "pixel_values", "img")
LABELS = ("label", "labels", "target", "targets")


def tensors(batch, where: str, indices: Sequence = ()) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch.

    Args:
        batch: (images, labels), or a mapping with one of ``IMAGES`` and one of ``LABELS``; tensors, arrays or lists.
        where: which batch, for messages.
        indices: of its images in the data set, where they are known.

    Returns:
        float32 [n, C, H, W] and int64 [n], both on the CPU.

    Raises:
        UserError: it holds something else.
    """
    first, second = _pair(batch)
    images, labels = _images(first, where), _labels(second, where)
    if labels.dim() == 0 and len(images) == 1:
        labels = labels[None]
    _check_images(images, len(labels) if labels.dim() else 1, where)
    _check_values(images, where, indices)
    return images.float(), _whole(labels, len(images), where)


def check_range(labels: Tensor, classes: int) -> None:
    """Refuses labels [n] that are no outputs of the network.

    Raises:
        UserError: a label is negative, or not below ``classes``.
    """
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise UserError(f"a label is {low}; labels are classes 0 to {classes - 1}: leave images without a class out")
    if high >= classes:
        raise UserError(f"a label is {high}, and the network has {classes} outputs, classes 0 to {classes - 1}; map "
                        "the labels to the network's classes" + (", they seem to begin at 1" if low == 1 else ""))


def _pair(batch) -> tuple[object, object]:
    if isinstance(batch, Mapping):
        found = [[key for key in batch if key in known] for known in (IMAGES, LABELS)]
        if [len(keys) for keys in found] != [1, 1]:
            seen = ", ".join(map(str, batch)) or "nothing"
            raise UserError(f"{WANTED}; it yields {type(batch).__name__} with {seen}, which needs one of "
                            f"{', '.join(IMAGES)} and one of {', '.join(LABELS)}")
        return batch[found[0][0]], batch[found[1][0]]
    if not isinstance(batch, (tuple, list)):
        raise UserError(f"{WANTED}; it yields {type(batch).__name__}. A single batch must stand in a list")
    if len(batch) != 2:
        raise UserError(f"{WANTED}; it yields {type(batch).__name__}s of {len(batch)}: leave the other parts out, "
                        "such as by a collate_fn")
    return batch[0], batch[1]


def _plain(value) -> Tensor | None:
    """A tensor of a tensor, array or number, or None."""
    if isinstance(value, Tensor):
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            raise UserError(f"{WANTED}; it yields a tensor without plain values (sparse, nested, or on the meta "
                            "device): give dense tensors, such as by to_dense()")
        return value.detach().as_subclass(Tensor).cpu()
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError, RuntimeError):  # what numpy and torch say to words, images, ragged lists
        return None


def _images(value, where: str) -> Tensor:
    if isinstance(value, (list, tuple)) and value:
        parts = [_plain(image) if hasattr(image, "shape") else None for image in value]
        if any(part is None for part in parts):
            raise UserError(f"{WANTED}; the images of {where} are {type(value[0]).__name__} objects: make them "
                            "tensors, such as by torchvision's ToTensor")
        shapes = list(dict.fromkeys(str(list(part.shape)) for part in parts))
        if len(shapes) > 1:
            raise UserError(f"{where} holds images of different shapes, {shapes[0]} and {shapes[1]}; resize them to "
                            "one size")
        return torch.stack(parts)
    images = _plain(value) if isinstance(value, Tensor) or hasattr(value, "shape") else None
    if images is None:
        raise UserError(f"{WANTED}; it yields {type(value).__name__} where the images should be")
    return images


def _check_images(images: Tensor, labels: int, where: str) -> None:
    shape = list(images.shape)
    if images.dim() != 4:
        remedy = "add the channels, images[:, None]" if shape[:1] == [labels] and len(shape) == 3 else \
            "give whole batches, such as by a DataLoader"
        raise UserError(f"{WANTED}; it yields tuple with images of shape {shape} ({where}); {remedy}")
    if not images.is_floating_point():
        raise UserError(f"the images of {where} are {str(images.dtype).removeprefix('torch.')}; give float images, "
                        "scaled and normalised as those that the network was trained on")
    if images.numel() == 0:
        raise UserError(f"{where} is empty: its images have shape {shape}")


def _check_values(images: Tensor, where: str, indices: Sequence) -> None:
    wrong = (~images.flatten(1).isfinite().all(1)).nonzero()
    if len(wrong):
        first, known = int(wrong[0]), len(indices) == len(images)
        which = f"image {indices[first]} of the data set" if known else f"image {first} of {where} (from 0)"
        raise UserError(f"{which} holds NaN or infinity; leave such images out, or repair how they are made")


def _labels(value, where: str) -> Tensor:
    if isinstance(value, (list, tuple)):
        value = [label.item() if isinstance(label, Tensor) and label.numel() == 1 else label for label in value]
    labels = _plain(value)
    if labels is None or labels.is_complex():
        one = value[0] if isinstance(value, (list, tuple)) and value else value
        raise UserError(f"the labels of {where} are {type(one).__name__} objects; give whole numbers [n], one an image")
    return labels


def _whole(labels: Tensor, images: int, where: str) -> Tensor:
    """Labels [n] as int64, or why they are none."""
    shape = list(labels.shape)
    if labels.dim() != 1:
        remedy = "labels[:, 0]" if shape[1:] == [1] else "labels.argmax(1), if they are one-hot"
        raise UserError(f"the labels of {where} have shape {shape}; they must be whole numbers [n], one an image: give "
                        f"{remedy}")
    if len(labels) != images:
        raise UserError(f"{where} has {images} images and {len(labels)} labels; give one label an image")
    odd = ~((labels == labels.round()) & (labels.abs() < LARGEST)) if labels.is_floating_point() else None
    if odd is not None and odd.any():
        raise UserError(f"a label of {where} is {labels[odd][0].item():g}; labels must be whole numbers, the classes")
    return labels.long()

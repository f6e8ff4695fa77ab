"""One-shot pruning of an ImageNet network, without any training: ours as it is, ours exactly, and Torch-Pruning's.

The folder that ``IMAGENET_SAMPLE`` names holds weights/imagenet_mobilenet_v2.safetensors (torchvision's names), and
imagenet_sample/labels.csv (path, class_index) beside the images that it lists. Half of the images are held out.
"""

import csv
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from _torch_pruning import PEERS, Task
from hobs_rspar import checkpoint, compress, cost, networks
from hobs_rspar.allocation import environment
from hobs_rspar.curvature import hobs, repair
from hobs_rspar.data import NORMALISATION, Images
from hobs_rspar.memory import peak_memory
from hobs_rspar.training import accuracy, logits

VARIABLE = "IMAGENET_SAMPLE"
BUDGET, EDGE, SHORT, BATCH = 0.8, 224, 256, 50
GRADIENTS = 32  # images of Torch-Pruning's gradients before each step
SPEC = networks.NetworkSpec("mobilenet_v2", 1000, 3, EDGE)
THEIRS = ("GroupMagnitude, uniform", "GroupMagnitude, global", "GroupTaylor, global")
WAYS = ("dense", "hobs_rspar", "hobs_rspar, exact", *(f"Torch-Pruning: {name}" for name in THEIRS))
COLUMNS = [["network", "Network"], ["macs_ratio", "MACs kept"], ["top1", "Top-1, held out (%)"],
           ["cpu_seconds", "CPU seconds"], ["peak", "Peak memory so far (GiB)"]]


def table() -> dict:
    """The table, its cells empty and the reason in its note where the folder is missing."""
    folder, title = os.environ.get(VARIABLE, ""), f"One-shot pruning of MobileNetV2 to {BUDGET:g}x MACs, no training"
    missing = [part for part in ("weights/imagenet_mobilenet_v2.safetensors", "imagenet_sample/labels.csv")
               if not (Path(folder) / part).is_file()]
    if not folder or missing:
        why = f"{folder} has no {missing[0]}" if folder else f"the environment variable {VARIABLE} names no folder"
        return {"name": "oneshot", "title": title, "columns": COLUMNS, "rows": [{"network": name} for name in WAYS],
                "note": f"Not measured: {why}."}
    rows = list(rows_of(Path(folder)))
    note = ("Calibration and validation images: half of the sample; held out: the other half. The sample's images look "
            "like training images, so compare within the table alone. 'exact' eliminates channel by channel, searches "
            "on all images and repairs all of them at once. Batch norms are re-estimated for all.")
    return {"name": "oneshot", "title": title, "columns": COLUMNS, "rows": rows, "note": note}


def rows_of(folder: Path) -> Iterator[dict]:
    """A row for every way, in the order in which memory grows but for Torch-Pruning's."""
    images = sample(folder / "imagenet_sample")
    half = len(images) // 2
    seen, held_out = images.first(half), part(images, half)
    dense = networks.build(SPEC)
    weights, _ = checkpoint.load_tensors(folder / "weights/imagenet_mobilenet_v2.safetensors")
    dense.load_state_dict(weights)
    yield row("dense", dense, dense, held_out, 0.0)
    for name in WAYS[1:]:
        started = time.process_time()
        network = made(name, dense, seen)
        yield row(name, dense, network, held_out, time.process_time() - started)


def made(name: str, dense: nn.Module, images: Images) -> nn.Module:
    """The pruned network of one way."""
    if name.startswith("hobs_rspar"):
        with exact() if name.endswith("exact") else nullcontext():
            return compress(dense, Batches(images), BUDGET)[0]
    task = Task(dense, SPEC.example(), images.first(GRADIENTS), BUDGET)
    network = task.pruned(PEERS[name.removeprefix("Torch-Pruning: ")])
    repair.reestimate_batchnorm(network, images, batch_size=BATCH)
    return network


@contextmanager
def exact() -> Iterator[None]:
    """Inside the block nothing is approximated to save time or memory."""
    with mock.patch.object(hobs, "SMALL", 2**62), mock.patch.object(environment, "PIXELS", 2**40), \
            mock.patch.object(repair, "HELD", 2**34):
        yield


def row(name: str, dense: nn.Module, network: nn.Module, held_out: Images, seconds: float) -> dict:
    before, after = (cost.count(which, SPEC.example()).macs for which in (dense, network))
    top1 = accuracy(logits(network, held_out, batch_size=BATCH), held_out.labels)
    return {"network": name, "macs_ratio": round(after / before, 4), "top1": round(top1, 2),
            "cpu_seconds": round(seconds, 1), "peak": round(peak_memory() / 2**30, 2)}


class Batches:
    """A loader of normalised images."""

    def __init__(self, images: Images):
        self.images = images

    def __iter__(self):
        return self.images.batches(BATCH)


def sample(folder: Path) -> Images:
    """All images of a folder, their middles, in a random order."""
    with (folder / "labels.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0)).tolist()
    pixels = torch.stack([middle(Image.open(folder / listed[i]["path"])) for i in order])
    labels = torch.tensor([int(listed[i]["class_index"]) for i in order])
    mean, std = (torch.tensor(values) for values in NORMALISATION["image_folder"])
    return Images(pixels, labels, mean, std)


def middle(image: Image.Image) -> torch.Tensor:
    """The middle of an image whose short side is made ``SHORT`` pixels, uint8 [3, EDGE, EDGE]."""
    image = image.convert("RGB")
    scale = SHORT / min(image.size)
    if scale != 1:
        image = image.resize(tuple(round(scale * size) for size in image.size), Image.Resampling.BILINEAR)
    left, top = ((size - EDGE) // 2 for size in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + EDGE, top + EDGE)))).permute(2, 0, 1)


def part(images: Images, start: int) -> Images:
    return Images(images.pixels[start:], images.labels[start:], images.mean, images.std)

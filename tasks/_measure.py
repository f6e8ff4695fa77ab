"""How fast this machine trains and evaluates a network: a second each, on random images, by the stages' own code."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

import _task  # noqa: F401  (it makes the package importable)
from hobs_rspar import training
from hobs_rspar.data import Images
from hobs_rspar.networks import NetworkSpec

PROBE = 8  # images of the first, careful step: a large network needs seconds for a whole batch
LONGEST = 15.0  # seconds; where a whole batch takes longer, the probe has to do
SECONDS = 1.0  # about what one measurement takes
STEPS = 8  # at most: enough for a mean


def training_speed(network: nn.Module, spec: NetworkSpec, recipe, device: torch.device,
                   teacher: nn.Module | None = None) -> float:
    """Images per second of a recipe at full image size, with the recipe's threads."""
    network, teacher = (copy.deepcopy(module).to(device) if module else None for module in (network, teacher))

    def train(images: int, batch: int) -> None:
        steps = recipe.model_copy(update={"epochs": 1, "crops": [], "batch_size": batch})
        task = training.Task(network, noise(spec, images, device), noise(spec, 1, device), steps, 0, "preview",
                             teacher)
        training.fit(task, training.State(), lambda state: None)

    return images_per_second(train, recipe.batch_size)


def inference_speed(network: nn.Module, spec: NetworkSpec, precision: str, device: torch.device) -> float:
    """Images per second of an evaluation, with the threads of the last training."""
    network = copy.deepcopy(network).to(device, memory_format=torch.channels_last)

    def infer(images: int, batch: int) -> None:
        training.logits(network, noise(spec, images, device), precision, batch)

    return images_per_second(infer, 256)


def images_per_second(work: Callable[[int, int], None], batch: int) -> float:
    """Times ``work(images, batch)``; every first run of a shape is for the compilation of its kernels."""
    work(PROBE, PROBE)
    rate = timed(work, PROBE, PROBE)
    if batch / rate > LONGEST:
        return rate
    work(batch, batch)
    steps = round(timed(work, batch, batch) * SECONDS / batch)
    return timed(work, min(STEPS, max(1, steps)) * batch, batch)


def timed(work: Callable[[int, int], None], images: int, batch: int) -> float:
    started = time.perf_counter()
    work(images, batch)
    return images / (time.perf_counter() - started)


def noise(spec: NetworkSpec, count: int, device: torch.device) -> Images:
    """Random images and labels of the network's shape."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, spec.in_channels, spec.image_size, spec.image_size), generator=random)
    labels = torch.randint(spec.classes, (count,), generator=random)
    half = torch.full((spec.in_channels,), 0.5)
    return Images(pixels.byte(), labels, half, half).to(device)

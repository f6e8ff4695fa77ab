"""What methods share that train the network before they prune it: options of the training, batches, and its steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.config import Fraction, Positive, Section
from hobs_rspar.coupling import Group
from hobs_rspar.criteria import places_of, weights
from hobs_rspar.data import Images, random_crops
from hobs_rspar.device import autocast

Above = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class TrainingOptions(Section):
    """Options of a training of the weights; params.yaml says what each is for."""

    images: Positive = 10_000
    batch_size: Positive = 128
    learning_rate: Above = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    warmup: Fraction = 0.2

    @property
    def steps(self) -> int:
        """Of the training: whole batches, at least one."""
        return max(1, self.images // self.batch_size)


def batches(images: Images, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end, flipped and shifted as in recovery; every pass is shuffled anew."""
    order = torch.randperm(len(images), generator=random)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(images), generator=random)])
        index, order = order[:size].to(images.pixels.device), order[size:]
        crops = random_crops(images.pixels[index], images.pixels.shape[-1], True, random)
        yield images.normalised(crops), images.labels[index]


def training_loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of a batch in training mode, which the network is left in; batch norms see the batch."""
    x, labels = batch
    network.train()
    with wide_batchnorm(network), autocast(x.device):
        out = network(x).float()
    return F.cross_entropy(out, labels)


@torch.no_grad()
def close(network: nn.Module, group: Group, channels: list[int]) -> None:
    """Sets all weights of some channels to zero, wherever the group has them."""
    for member in group.members if channels else ():
        for weight, axis, places in weights(network, member):
            weight.index_fill_(axis, places_of(places, channels, weight.device), 0)

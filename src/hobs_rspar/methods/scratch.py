"""Scratch: the architecture that hobs_rspar finds, trained from random weights for as long as the dense network was.

Paper: Liu et al., Rethinking the Value of Network Pruning, ICLR 2019 ("Scratch-B", equal computation). A control: what
the inherited weights are worth. The widths are those of ``hobs_rspar`` at its default options and the same seed; all
weights are drawn anew and trained with as many multiply-accumulates as the dense network's training took, that is, on
more images by the factor that the small network is cheaper; then comes the same recovery as for every method, teacher
included. Simplified: their longer schedules; one one-cycle schedule of full images here. Off by default, because a cell
takes half an hour. Published: at equal computation as accurate as pruning and fine-tuning, or better, for most methods
that they tried on CIFAR and ImageNet.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from hobs_rspar import checkpoint
from hobs_rspar.config import Positive
from hobs_rspar.coupling import Groups
from hobs_rspar.methods import _rspar
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import Above, NonNegative, TrainingOptions, batches, training_loss
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate


class Options(TrainingOptions):
    """Options of the training; params.yaml says what each is for. ``images`` are those of the dense network's."""

    images: Positive = 490_000
    learning_rate: Above = 0.1
    weight_decay: NonNegative = 1e-3
    search: _rspar.Options = _rspar.Options()


def plan(context: Context, options: Options) -> PruningPlan:
    found = architecture(context, options.search)
    network = fresh(sliced(context.network, context.groups, found.kept), context.derived_seed)
    seen = train(network, context, options, found.macs_ratio)
    weights = extended(network.state_dict(), context.network.state_dict(), context.groups, found.kept)
    return replace(found, method=context.method, decided_by=f"{found.decided_by}; weights from scratch", repair="none",
                   extra_training_images=seen, weights=weights)


def architecture(context: Context, search: _rspar.Options) -> PruningPlan:
    """The plan of ``hobs_rspar`` for the same seed."""
    ours = replace(context, method="hobs_rspar")
    scores, relative = (ours.per_group(ours.sensitivity[name]) for name in ("hobs", "relative"))
    return _rspar.searched(ours, search, scores, relative, "H-OBS")


def sliced(network: nn.Module, groups: Groups, kept: list[list[int]]) -> nn.Module:
    """A copy of the network with the kept channels only."""
    return checkpoint.fit(copy.deepcopy(network), groups.sliced(network.state_dict(), kept), "scratch")


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """The network with the weights of every layer drawn anew, in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return network


def train(network: nn.Module, context: Context, options: Options, macs_ratio: float) -> int:
    """Trains in place with the MACs of ``options.images`` dense images; the images seen."""
    steps = max(1, int(options.images / macs_ratio) // options.batch_size)
    network.to(memory_format=torch.contiguous_format)  # in channels_last, narrow shortcuts meet what strided.py is for
    data = batches(context.train, options.batch_size, context.generator)
    descent = SGD(network, options, {})
    for step in bar(range(steps), "from scratch"):
        x, labels = next(data)
        training_loss(network, (x.clone(memory_format=torch.contiguous_format), labels)).backward()
        descent.step(learning_rate(options, step, steps))
    return steps * options.batch_size


def extended(small: dict[str, Tensor], dense: dict[str, Tensor], groups: Groups,
             kept: list[list[int]]) -> dict[str, Tensor]:
    """A dense state dict of which surgery keeps just ``small``; what surgery removes is the dense network's own."""
    places = groups.sliced({name: torch.arange(part.numel()).view(part.shape) for name, part in dense.items()}, kept)
    whole = {name: part.detach().cpu().clone(memory_format=torch.contiguous_format) for name, part in dense.items()}
    for name, part in whole.items():
        part.view(-1)[places[name].flatten()] = small[name].detach().cpu().to(part.dtype).flatten()
    return whole

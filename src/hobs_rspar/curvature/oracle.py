"""What single-channel scores predict, by brute force: the loss change of closing every channel in turn.

Everything that is executed before a channel is first consumed is the same as in the dense network and is replayed from
memory: in a residual network that is about two thirds of the arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.coupling import Group, Groups
from hobs_rspar.criteria import weights
from hobs_rspar.data import Images
from hobs_rspar.folding import following_norms, fused


@torch.no_grad()
def loss_changes(network: nn.Module, groups: Groups, images: Images, batch_size: int) -> Tensor:
    """True change of the mean cross entropy when each channel alone is closed [channels of all groups].

    Args:
        network: in evaluation mode; untouched.
        groups: of the network; a group that is kept whole costs nan.
        images: on which the loss is measured.
        batch_size: images a pass; the outputs of all modules are held for so many.
    """
    network = _fused(network, images.normalised(images.pixels[:1]))
    changes = [torch.zeros(group.channels, dtype=torch.float64) if group.with_role("consumer") else
               torch.full((group.channels,), torch.nan, dtype=torch.float64) for group in groups]
    for x, labels in images.batches(batch_size):
        record = Record(network)
        dense = F.cross_entropy(record(x), labels, reduction="sum").item()
        for group, change in zip(groups, changes):
            if group.with_role("consumer"):
                with record.replayed(record.unaffected(group)):
                    change += _closed_losses(network, group, x, labels) - dense
    return torch.cat(changes) / len(images)


def _fused(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose batch norms are in the weights: a sixth of the time less."""
    network = copy.deepcopy(network)
    names = {module: name for name, module in network.named_modules()}
    for name, norm in following_norms(network, x).items():
        layer = network.get_submodule(name)
        layer.weight, layer.bias = (nn.Parameter(part, False) for part in fused(layer, norm))
        network.set_submodule(names[norm], nn.Identity())
    return network


def _closed_losses(network: nn.Module, group: Group, x: Tensor, labels: Tensor) -> Tensor:
    """Summed cross entropy of one batch with each channel of a group closed [channels]."""
    losses = torch.zeros(group.channels, dtype=torch.float64)
    for channel in range(group.channels):
        with closed(network, group, channel):
            losses[channel] = F.cross_entropy(network(x), labels, reduction="sum").item()
    return losses


@contextmanager
def closed(network: nn.Module, group: Group, channel: int) -> Iterator[None]:
    """Inside the ``with`` block the group's consumers do not see ``channel``: its input weights are zero."""
    found = [(weight, axis, torch.tensor(places[channel], device=weight.device))
             for member in group.with_role("consumer") for weight, axis, places in weights(network, member)]
    kept = [weight.index_select(axis, places) for weight, axis, places in found]
    for weight, axis, places in found:
        weight.index_fill_(axis, places, 0)
    try:
        yield
    finally:
        for (weight, axis, places), values in zip(found, kept):
            weight.index_copy_(axis, places, values)


class Record:
    """The outputs of all modules in one forward pass, and when they were there.

    Args:
        network: whose modules are recorded by calling the record, and replayed.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.modules = {name: module for name, module in network.named_modules() if name}
        self.outputs: dict[str, Tensor] = {}
        self.begun: dict[str, list[int]] = {}
        self.ended: dict[str, int] = {}
        self._versions: dict[str, list[int]] = {}
        self._in_place: set[str] = set()
        self._clock = 0

    def __call__(self, x: Tensor) -> Tensor:
        hooks = []
        for name, module in self.modules.items():
            hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
            hooks.append(module.register_forward_hook(partial(self._end, name)))
        try:
            return self.network(x)
        finally:
            for handle in hooks:
                handle.remove()

    def unaffected(self, group: Group) -> list[str]:
        """Modules, called once, that have ended before any consumer of the group begins."""
        first = min(self.begun[member.layer][0] for member in group.with_role("consumer"))
        return [name for name, end in self.ended.items() if end < first and len(self.begun[name]) == 1]

    @contextmanager
    def replayed(self, names: list[str]) -> Iterator[None]:
        """Inside the ``with`` block these modules return what they returned."""
        def replay(name: str):
            def forward(*inputs, **_options) -> Tensor:
                if name in self._in_place:
                    return inputs[0].copy_(self.outputs[name])
                return self.outputs[name].clone()
            return forward

        for name in names:
            self.modules[name].forward = replay(name)
        try:
            yield
        finally:
            for name in names:
                del self.modules[name].forward

    def _begin(self, name: str, _module: nn.Module, inputs: tuple) -> None:
        self._clock += 1
        self.begun.setdefault(name, []).append(self._clock)
        self._versions[name] = [part._version for part in inputs if isinstance(part, Tensor)]

    def _end(self, name: str, _module: nn.Module, inputs: tuple, out) -> None:
        self._clock += 1
        if not isinstance(out, Tensor):
            return  # its parts are replayed, not itself
        if [part._version for part in inputs if isinstance(part, Tensor)] != self._versions[name]:
            if out is not inputs[0]:
                return  # a block of which some part changes the block's input in place
            self._in_place.add(name)
        self.ended[name] = self._clock
        self.outputs[name] = out.clone()  # a later operation may change it in place

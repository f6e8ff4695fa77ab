"""Gates: the points after batch norm and activation where a group's channel can be switched off.

A gate multiplies a channel wherever it is consumed. A gate at 0 is exactly a removed channel (a zeroed filter is not:
after batch norm it still emits a constant), and the gradient with respect to the gates holds every first- and
second-order score of whole channels: s_nc = sum over consumers and positions of activation x gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.coupling import Groups
from hobs_rspar.data import Images


class Gates:
    """All gates of a network as one tensor.

    Attributes:
        offsets: first column of every group; group g owns columns ``offsets[g]:offsets[g + 1]``.
        lookup: consumer layer -> column of every input channel [inputs]; the last column is always open.
    """

    def __init__(self, groups: Groups):
        self.offsets = [0, *torch.tensor(groups.sizes.tolist()).cumsum(0).tolist()]
        self.lookup: dict[str, Tensor] = {}
        for start, group in zip(self.offsets, groups):
            for member in group.with_role("consumer"):
                inputs = groups.layers[member.layer][2]
                table = self.lookup.setdefault(member.layer, torch.full((inputs,), self.total))
                for channel, index in enumerate(member.index):
                    table[list(index)] = start + channel

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def split(self, values: Tensor) -> list[Tensor]:
        """Values [..., channels of all groups] as one tensor per group."""
        return [values[..., a:b] for a, b in zip(self.offsets, self.offsets[1:])]

    def mask(self, kept: list[list[int]]) -> Tensor:
        """Gates [1, total] that are 1 for kept channels and 0 for the others."""
        mask = torch.zeros(1, self.total)
        for start, channels in zip(self.offsets, kept):
            mask[0, [start + channel for channel in channels]] = 1
        return mask

    @contextmanager
    def applied(self, network: nn.Module, values: Tensor) -> Iterator[None]:
        """Multiplies the inputs of all consumers by the gates inside the ``with`` block.

        Args:
            network: gets forward hooks, and loses them at the end.
            values: [1, total], or [N, total] for gates of their own for every image.
        """
        padded = torch.cat([values, torch.ones_like(values[:, :1])], 1)

        def hook(table: Tensor):
            def multiply(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                gate = padded[:, table]
                return (inputs[0] * (gate[:, :, None, None] if inputs[0].dim() == 4 else gate), *inputs[1:])
            return multiply

        hooks = [network.get_submodule(name).register_forward_pre_hook(hook(table.to(values.device)))
                 for name, table in self.lookup.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def gate_gradients(network: nn.Module, gates: Gates, images: Images, batch_size: int,
                   generator: torch.Generator | None = None) -> Tensor:
    """Per-image gradients of the loss with respect to all gates: one forward and one backward, no weight gradients.

    Args:
        network: in evaluation mode; untouched.
        gates: of the network's groups.
        images: calibration images [N].
        batch_size: images a pass.
        generator: draws labels from the network's own prediction (then the rows' second moment is the Fisher);
            None takes the true labels (then it is the *empirical* Fisher, and the mean is the signed first order).

    Returns:
        S [N, total], float32 on the CPU: the gradient of each image's own loss.
    """
    frozen = [(p, p.requires_grad) for p in network.parameters()]
    for parameter, _ in frozen:
        parameter.requires_grad_(False)
    try:
        return torch.cat([_rows(network, gates, x, labels, generator) for x, labels in images.batches(batch_size)])
    finally:
        for parameter, flag in frozen:
            parameter.requires_grad_(flag)


@torch.enable_grad()
def _rows(network: nn.Module, gates: Gates, x: Tensor, labels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gradients of one batch [n, total]."""
    values = torch.ones(len(x), gates.total, device=x.device, requires_grad=True)
    with gates.applied(network, values):
        out = network(x)
    if generator is not None:
        labels = sampled_labels(out, generator)
    return torch.autograd.grad(F.cross_entropy(out, labels, reduction="sum"), values)[0].cpu()


def sampled_labels(out: Tensor, generator: torch.Generator) -> Tensor:
    """Labels [n] drawn from softmax(out): what makes a second moment of gradients the Fisher."""
    return torch.multinomial(out.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(out.device)


def fisher_score(rows: Tensor) -> Tensor:
    """Exact diagonal Fisher of the gates: half of E[s^2], the second-order loss of closing each gate [total]."""
    return 0.5 * rows.square().mean(0)


def taylor_score(rows: Tensor, batch_size: int) -> Tensor:
    """Molchanov et al. 2019: squared gradient of a minibatch's mean loss, averaged over minibatches [total]."""
    return torch.stack([part.mean(0).square() for part in rows.split(batch_size)]).mean(0)

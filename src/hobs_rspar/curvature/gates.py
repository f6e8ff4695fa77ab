"""Gates: the points after batch norm and activation where a group's channel can be switched off.

A gate multiplies a channel wherever it is consumed. A gate at 0 is exactly a removed channel (a zeroed filter is not:
after batch norm it still emits a constant), and the gradient with respect to the gates holds every first- and
second-order score of whole channels: s_nc = sum over consumers and positions of activation x gradient. It is read where
gradients pass the consumers' inputs; nothing is multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.layout import Pass, by_image, channel_axis
from hobs_rspar.curvature.passes import products, sweep
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.folding import Norms

ROWS_BYTES = 2**30  # of the rows of one kind; larger ones are kept in bfloat16


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
            def multiply(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                return gated(layer, inputs[0], padded[:, table]), *inputs[1:]
            return multiply

        hooks = [network.get_submodule(name).register_forward_pre_hook(hook(table.to(values.device)))
                 for name, table in self.lookup.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def gated(layer: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """A layer's input with its channels multiplied.

    Args:
        layer: tells where the channels are.
        x: its input, whose rows may be more than the images [N * k, ...].
        gate: of all images [1, C], or of each [N, C].
    """
    if len(gate) not in (1, len(x)):
        gate = gate.repeat_interleave(len(x) // len(gate), 0)
    after = -1 - channel_axis(layer)
    return x * gate.view(len(gate), *[1] * (x.dim() - 2 - after), -1, *[1] * after)


class GateGradients:
    """Watches a sweep: per-image gradients of the loss with respect to all gates.

    Args:
        network: that the sweep passes.
        gates: of its groups.
        count: images of the sweep.

    Attributes:
        rows: S [count, total] on the CPU, the gradient of each image's own loss; float32, or bfloat16 where that
            would take more than ``ROWS_BYTES``.
    """

    def __init__(self, network: nn.Module, gates: Gates, count: int):
        self.network, self.gates = network, gates
        small = 4 * count * gates.total <= ROWS_BYTES
        self.rows = torch.empty(count, gates.total, dtype=torch.float32 if small else torch.bfloat16)
        self._done, self._pass = 0, Pass()
        self._batch: Tensor | None = None

    @contextmanager
    def watching(self, _norms: Norms) -> Iterator[None]:
        """Hooks on all consumers inside the ``with`` block."""
        hooks = [self._pass.watch(self.network)]
        hooks += [self.network.get_submodule(name).register_forward_pre_hook(self._hook(name, table))
                  for name, table in self.gates.lookup.items()]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()

    def collect(self) -> None:
        """Takes what the last backward pass showed as the next rows."""
        until = self._done + self._pass.images
        self.rows[self._done:until] = 0 if self._batch is None else self._batch[:, :-1].cpu()
        self._done, self._batch = until, None

    def _hook(self, name: str, table: Tensor):
        def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = inputs[0].detach()
            own = inputs[0].view_as(inputs[0])  # its gradient is that through this consumer alone
            if not own.requires_grad:  # nothing before it has a weight that autograd sees
                own = x.view_as(x).requires_grad_()
            own.register_hook(partial(self._add, (name, layer), table.to(x.device), (x, x._version)))
            return own, *inputs[1:]
        return watch

    def _add(self, consumer: tuple[str, nn.Module], table: Tensor, seen: tuple[Tensor, int], gradient: Tensor) -> None:
        (name, layer), (x, version) = consumer, seen
        if x._version != version:
            raise UserError(f"the input of '{name}' is changed in place after '{name}' has read it; write that "
                            "operation out of place (inplace=False)")
        x, gradient = (by_image(layer, part, self._pass.images) for part in (x, gradient))
        sums = products(x, gradient, channel_axis(layer))
        if self._batch is None:
            self._batch = sums.new_zeros(len(sums), self.gates.total + 1)  # the last column: always open
        self._batch.index_add_(1, table, sums)


def gate_gradients(network: nn.Module, gates: Gates, images: Images, batch_size: int,
                   generator: torch.Generator | None = None) -> Tensor:
    """Per-image gradients of the loss with respect to all gates, from one sweep with one kind of labels.

    Args:
        network: in evaluation mode; untouched.
        gates: of the network's groups.
        images: calibration images [N].
        batch_size: images a pass.
        generator: draws labels from the network's own prediction (then the rows' second moment is the Fisher);
            None takes the true labels (then it is the *empirical* Fisher, and the mean is the signed first order).

    Returns:
        S [N, total] on the CPU: the gradient of each image's own loss.
    """
    seen = GateGradients(network, gates, len(images))
    sweep(network, images, batch_size, [seen], generator)
    return seen.rows


def relabelled(network: nn.Module, gates: Gates, images: Images, batch_size: int, rows: Tensor,
               labels: Tensor) -> Tensor:
    """Rows of the images' own labels, given those of others: only images whose labels differ are passed again.

    An image's gradient depends on no other image. Labels drawn from a good network are mostly the true ones, so that
    both kinds of labels cost hardly more than one.

    Args:
        network: in evaluation mode; untouched.
        gates: of the network's groups.
        images: calibration images [N].
        batch_size: images a pass.
        rows: of ``labels`` [N, total].
        labels: that ``rows`` belong to [N].

    Returns:
        S [N, total] of ``images.labels``.
    """
    rows, differ = rows.clone(), (labels != images.labels).nonzero()[:, 0]
    if len(differ):
        others = replace(images, pixels=images.pixels[differ], labels=images.labels[differ])
        rows[differ.cpu()] = gate_gradients(network, gates, others, batch_size)
    return rows


def fisher_score(rows: Tensor) -> Tensor:
    """Exact diagonal Fisher of the gates: half of E[s^2], the second-order loss of closing each gate [total]."""
    return 0.5 * rows.float().square().mean(0)


def signed_score(true_rows: Tensor, rows: Tensor) -> Tensor:
    """Predicted loss change of closing each gate alone, to second order: -E[s] + 1/2 E[s^2] [total].

    Args:
        true_rows: gate gradients of the true labels [N, total]; the loss falls where their mean is positive.
        rows: those of sampled labels (Fisher), or the true ones again (empirical Fisher, one backward pass fewer).
    """
    return fisher_score(rows) - true_rows.float().mean(0)


def taylor_score(rows: Tensor, batch_size: int) -> Tensor:
    """Molchanov et al. 2019: squared gradient of a minibatch's mean loss, averaged over minibatches [total]."""
    return torch.stack([part.float().mean(0).square() for part in rows.split(batch_size)]).mean(0)

"""What chosen layers get and give in passes of a network, at the same random positions in every network compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.kfac import output_rows, patches, sampled_positions
from hobs_rspar.data import Images

See = Callable[[str, nn.Module, Tensor], None]


@dataclass(frozen=True)
class Observed:
    """Layers that are compared.

    Attributes:
        positions: name -> output positions [P], or None for all; in order of execution.
        left: name -> the outputs that the layer still has, where it lost some.
        frontier: bytes of the largest input and output of a layer together, for one image.
    """

    positions: dict[str, Tensor | None]
    left: dict[str, Tensor]
    frontier: int

    @property
    def names(self) -> list[str]:
        return list(self.positions)

    def some(self, names: Sequence[str]) -> Observed:
        return Observed({name: self.positions[name] for name in names}, self.left, self.frontier)


@torch.no_grad()
def shrunk_consumers(network: nn.Module, groups: Groups, kept: Sequence[Sequence[int]], images: Images, count: int,
                     generator: torch.Generator) -> Observed:
    """Consumers of groups that lose channels.

    Left out are layers that their patches do not describe, that are called more than once, or that share their weight
    with another layer: none of these can be given a weight of their own.

    Args:
        network: dense.
        groups: of the network.
        kept: kept channels of every group.
        images: one of them is passed.
        count: output positions per image and layer, at most.
        generator: draws them.
    """
    shrunk = {member.layer for group, channels in zip(groups, kept) if len(channels) < group.channels
              for member in group.with_role("consumer")} - groups.opaque.keys() - _tied(network)
    rows = {member.layer: torch.tensor(member.of(channels)) for group, channels in zip(groups, kept)
            if len(channels) < group.channels for member in group.with_role("producer")}
    example, called = images.normalised(images.pixels[:1]), []
    found: dict[str, Tensor | None] = {}

    def choose(name: str, layer: nn.Module, x: Tensor) -> None:
        called.append(name)
        if name not in found:
            found[name] = sampled_positions(layer, x, count, generator, 1)

    names = [name for name in groups.layers if name in shrunk]
    with _before(network, names, choose):
        network(example)
    return Observed({name: found[name] for name in names if called.count(name) == 1}, rows, frontier(network, example))


@torch.no_grad()
def frontier(network: nn.Module, example: Tensor) -> int:
    """Bytes of the largest input and output of a module together, for one image [1, C, H, W]."""
    sizes = [1]

    def measure(_module: nn.Module, values: tuple, out) -> None:
        sizes.append(sum(t.numel() * t.element_size() for t in (*values, out) if isinstance(t, Tensor)))

    hooks = [module.register_forward_hook(measure) for module in network.modules() if not any(module.children())]
    _run(network, example, hooks)
    return max(sizes)


def _tied(network: nn.Module) -> set[str]:
    """Layers whose weight is another layer's, too."""
    owners: dict[int, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "weight", None), Tensor):
            owners.setdefault(id(module.weight), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


@torch.no_grad()
def outputs(network: nn.Module, layers: Observed, x: Tensor) -> dict[str, Tensor]:
    """Outputs of the layers without their biases, at their positions [N * P, outputs]; the pass ends after the last.

    Args:
        network: in the mode in which it is to run.
        layers: in order of execution.
        x: images [N, C, H, W].
    """
    found: dict[str, Tensor] = {}

    def hook(name: str):
        def keep(layer: nn.Module, _inputs, out: Tensor) -> None:
            rows = output_rows(layer, out, layers.positions[name], len(x))
            found[name] = rows.clone() if layer.bias is None else rows - layer.bias
            if len(found) == len(layers.positions):
                raise _Enough
        return keep

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in layers.positions]
    _run(network, x, hooks)
    return found


@torch.no_grad()
def inputs(network: nn.Module, layers: Observed, x: Tensor, see: See) -> None:
    """Passes images; ``see`` gets name, layer and input patches [groups, N * P, d + 1] just before the layer runs.

    The pass ends before the last layer.
    """
    seen = []

    def rows(name: str, layer: nn.Module, value: Tensor) -> None:
        see(name, layer, patches(layer, value, layers.positions[name], len(x))[0])
        seen.append(name)
        if len(seen) == len(layers.positions):
            raise _Enough

    with _before(network, layers.names, rows):
        _run(network, x, [])


class _Enough(Exception):
    """Nothing that comes after is of interest."""


def _run(network: nn.Module, x: Tensor, hooks: list) -> None:
    try:
        network(x)
    except _Enough:
        pass
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def _before(network: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """Inside the block ``see`` gets name, layer and input of every call of the layers."""
    hooks = [network.get_submodule(name).register_forward_pre_hook(
        lambda layer, values, name=name: see(name, layer, values[0])) for name in names]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()

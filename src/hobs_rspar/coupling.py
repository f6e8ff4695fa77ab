"""Coupled channels: which layers must lose a channel together, what a width costs, and how weights are sliced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hobs_rspar.errors import UserError, did_you_mean

PLURALS = {"producer": "producers", "norm": "norms", "consumer": "consumers"}
ROLES = ("producer", "depthwise", "norm", "consumer", "auxiliary")


@dataclass(frozen=True)
class Member:
    """One layer's part in a group.

    Attributes:
        layer: the layer's name.
        role: ``producer`` and ``depthwise`` lose output channels, ``norm`` whatever it has for every channel (norms,
            PReLU, bare parameters), ``consumer`` its inputs; ``auxiliary`` is a layer that runs in training mode only.
        index: for every channel of the group the layer's own indices [channels][1 or more] (more than one where a
            channel is flattened into several inputs of a linear layer, or the layer is a grouped convolution).
        cuts: the layer's tensors that are sliced, each with its axis. An index counts from the start again where the
            axis ends: the weight of a grouped convolution has the channels of one of its groups.
    """

    layer: str
    role: str
    index: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[str, int], ...] = ()

    def of(self, channels: Sequence[int]) -> list[int]:
        """The layer's own indices of some of the group's channels."""
        return [i for channel in channels for i in self.index[channel]]


@dataclass(frozen=True)
class Group:
    """Channels that must be removed together. Its name is that of the first producer in order of execution."""

    name: str
    channels: int
    members: tuple[Member, ...]
    protected: str = ""

    def with_role(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]


class Groups(Sequence[Group]):
    """All groups of a network, in order of execution.

    Attributes:
        layers: cost of every convolution and linear layer: name -> (MACs, outputs, inputs).
        fixed_macs: MACs of everything else, such as products of activations, which no plan changes.
        opaque: layers that do not compute what their weight says -> why; nothing scores or refits them by it.
    """

    def __init__(self, groups: Sequence[Group], layers: dict[str, tuple[int, int, int]], fixed_macs: int = 0,
                 opaque: dict[str, str] | None = None):
        self.groups, self.layers, self.fixed_macs = list(groups), layers, fixed_macs
        self.opaque = opaque or {}

    def __getitem__(self, index):
        return self.groups[index]

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def sizes(self) -> np.ndarray:
        """Channels of every group [groups]."""
        return np.array([group.channels for group in self.groups])

    @cached_property
    def dense_macs(self) -> int:
        return self.fixed_macs + sum(macs for macs, _, _ in self.layers.values())

    def named(self, name: str) -> Group:
        """The group called ``name``, or the one in which the layer ``name`` produces channels."""
        for group in self.groups:
            if group.name == name or any(m.layer == name for m in group.with_role("producer", "depthwise")):
                return group
        names = [group.name for group in self.groups]
        raise UserError(f"no group '{name}'.{did_you_mean(name, names)} Groups: {', '.join(names)}")

    def macs(self, widths: np.ndarray) -> np.ndarray:
        """MACs of the network at given widths, without building it.

        Args:
            widths: kept channels [..., groups].

        Returns:
            MACs [...], exactly what :func:`hobs_rspar.cost.count` finds on the pruned network.
        """
        removed = self.sizes - np.asarray(widths)
        linear, quadratic = self.polynomial
        saved = removed @ linear - np.einsum("...i,...i->...", removed @ quadratic, removed)
        return np.rint(self.dense_macs - saved).astype(np.int64)

    def macs_after(self, widths: np.ndarray, moves: np.ndarray) -> np.ndarray:
        """MACs [n, moves] after each change of widths [moves, groups] from each of some widths [n, groups]."""
        linear, quadratic = self.polynomial
        slope = linear - 2 * (self.sizes - widths) @ quadratic
        bend = np.einsum("mi,mi->m", moves @ quadratic, moves)
        return self.macs(widths)[:, None] + np.rint(slope @ moves.T + bend).astype(np.int64)

    def layer_widths(self, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and outputs of every layer, in the order of ``layers`` ([..., layers], [..., layers]).

        A depthwise layer has as many inputs as outputs, which are counted once, as its outputs.

        Args:
            widths: kept channels [..., groups].
        """
        removed, (out, into) = self.sizes - np.asarray(widths), self._coefficients
        _, outputs, inputs = (np.array(column) for column in zip(*self.layers.values()))
        return inputs - removed @ into.T, outputs - removed @ out.T

    @cached_property
    def polynomial(self) -> tuple[np.ndarray, np.ndarray]:
        """MACs are quadratic in the removed channels r: dense - r . linear + r' quadratic r ([groups], symmetric)."""
        macs, outputs, inputs = (np.array(column, float) for column in zip(*self.layers.values()))
        out, into = self._coefficients
        out, into = out / outputs[:, None], into / inputs[:, None]
        product = (macs[:, None] * out).T @ into
        return macs @ (out + into), (product + product.T) / 2

    @cached_property
    def _coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Outputs and inputs that one channel of each group takes from every layer ([layers, groups] both)."""
        position = {name: i for i, name in enumerate(self.layers)}
        out, into = np.zeros((2, len(self.layers), len(self)))
        for g, group in enumerate(self.groups):
            for member in group.members:
                if member.role in ("producer", "depthwise", "consumer"):
                    side = into if member.role == "consumer" else out
                    side[position[member.layer], g] = len(member.index[0])
        return out, into

    def sliced(self, state: dict[str, Tensor], kept: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The state dict that remains when every group keeps only the channels ``kept[g]`` (sorted)."""
        state = dict(state)
        for group, channels in zip(self.groups, kept):
            if len(channels) == group.channels:
                continue
            dead = sorted(set(range(group.channels)) - set(channels))
            for member in group.members:
                for tensor, axis in member.cuts:
                    name = f"{member.layer}.{tensor}" if member.layer else tensor
                    size = member_size(state[name], axis)
                    gone = {i % size for i in member.of(dead)}
                    alive = torch.tensor([i for i in range(size) if i not in gone])
                    state[name] = _Pending.cut(state[name], axis, alive)
        return {name: tensor.done() if isinstance(tensor, _Pending) else tensor for name, tensor in state.items()}

    def to_json(self) -> dict:
        return {"layers": {name: list(values) for name, values in self.layers.items()},
                "groups": [{"name": g.name, "channels": g.channels, "protected": g.protected,
                            "members": [{"layer": m.layer, "role": m.role, "index": _packed(m.index), "cuts": m.cuts}
                                        for m in g.members]} for g in self.groups],
                "fixed_macs": self.fixed_macs, "opaque": self.opaque}

    @classmethod
    def from_json(cls, text: dict) -> Groups:
        groups = [Group(g["name"], g["channels"],
                        tuple(Member(m["layer"], m["role"], _unpacked(m["index"]), tuple(map(tuple, m["cuts"])))
                              for m in g["members"]), g["protected"]) for g in text["groups"]]
        return cls(groups, {name: tuple(values) for name, values in text["layers"].items()}, text["fixed_macs"],
                   text["opaque"])

    def __str__(self) -> str:
        lines = [f"{len(self)} groups, {int(self.sizes.sum())} channels, {self.dense_macs / 1e6:.1f} M MACs"]
        for group in self.groups:
            lines.append(f"  {group.name}: {group.channels} channels"
                         + (f" (kept whole: {group.protected})" if group.protected else ""))
            for role in ROLES:
                names = [member.layer for member in group.with_role(role)]
                if names:
                    lines.append(f"      {PLURALS.get(role, role)}: {', '.join(names)}")
        lines += [f"  {name} is neither scored nor refitted by its weight: {why}" for name, why in self.opaque.items()]
        return "\n".join(lines)


class _Pending:
    """A tensor and the indices that remain on each axis; groups that share a layer cut it one after the other."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.alive = tensor, {}

    @staticmethod
    def cut(tensor: Tensor | _Pending, axis: int, alive: Tensor) -> _Pending:
        pending = tensor if isinstance(tensor, _Pending) else _Pending(tensor)
        before = pending.alive.get(axis)
        pending.alive[axis] = alive if before is None else before[torch.isin(before, alive)]
        return pending

    def done(self) -> Tensor:
        out = self.tensor
        for axis, alive in self.alive.items():
            out = out.index_select(axis, alive.to(out.device))
        return out


def member_size(tensor: Tensor | _Pending, axis: int) -> int:
    """Length of an axis before any cut."""
    return (tensor.tensor if isinstance(tensor, _Pending) else tensor).shape[axis]


def _packed(index: tuple[tuple[int, ...], ...]) -> list:
    """[first, channels, multiplicity] for the usual contiguous index, else the index itself."""
    flat = [i for part in index for i in part]
    if flat == list(range(flat[0], flat[0] + len(flat))) and len({len(part) for part in index}) == 1:
        return [flat[0], len(index), len(index[0])]
    return [list(part) for part in index]


def _unpacked(packed: list) -> tuple[tuple[int, ...], ...]:
    if packed and isinstance(packed[0], int):
        first, channels, many = packed
        return tuple(tuple(range(first + c * many, first + (c + 1) * many)) for c in range(channels))
    return tuple(tuple(part) for part in packed)

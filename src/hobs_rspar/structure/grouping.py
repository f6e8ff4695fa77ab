"""From a trace to groups: sets of channels that pass the same layers in the same way form one group."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from hobs_rspar.cost import LAYERS, TRANSPOSED
from hobs_rspar.coupling import Group, Member
from hobs_rspar.structure.channels import Axis
from hobs_rspar.structure.trace import OUTPUT, Trace


@dataclass(frozen=True)
class Place:
    """What one set of channels is in one layer: its role there, the layer's own indices, and the tensors to cut."""

    layer: str
    role: str
    index: tuple[int, ...]
    cuts: tuple[tuple[str, int], ...]

    @property
    def kind(self) -> tuple:
        return self.layer, self.role, len(self.index), self.cuts


def found_groups(trace: Trace, called: list[str]) -> list[Group]:
    """All groups of a traced network, in order of execution.

    Args:
        trace: of all passes.
        called: layers that run in evaluation, in order; others are there in training only.
    """
    _pin_what_no_group_can_have(trace)
    places, reasons = _places(trace, called), trace.channels.reasons()
    bundles: dict[tuple, list[list[Place]]] = defaultdict(list)
    order = {name: i for i, name in enumerate(called)}
    for number, found in places.items():
        found = sorted(found, key=lambda place: (trace.order.get(place.layer, 0), place.index))
        if any(place.role == "producer" for place in found):
            bundles[tuple(place.kind for place in found), tuple(reasons.get(number, ()))].append(found)
    groups = [group for (_, why), sets in bundles.items() if (group := _group(sets, why))]
    groups.sort(key=lambda group: (order[_first(group).layer], _first(group).index[0]))
    return _named(groups)


def _first(group: Group) -> Member:
    return group.with_role("producer")[0]


def _group(sets: list[list[Place]], why: tuple[str, ...]) -> Group | None:
    """One group; None where nothing consumes it, as the network's output."""
    first = [place.role for place in sets[0]].index("producer")
    sets = sorted(sets, key=lambda found: found[first].index)
    members = tuple(Member(place.layer, place.role, tuple(found[i].index for found in sets), place.cuts)
                    for i, place in enumerate(sets[0]))
    consumed = any(member.role == "consumer" for member in members)
    if not consumed and (not why or why == (OUTPUT,)):
        return None
    if not why and len(sets) == 1:
        count, others = len(sets[0][first].index), [place.layer for place in sets[0] if place != sets[0][first]]
        why = (f"its {count} channels all hang together ({', '.join(others)})" if count > 1 else
               "it has one channel only",)
    group = Group(members[first].layer, len(sets), members)
    return whole(group, "; ".join(why)) if why else group


def whole(group: Group, reason: str) -> Group:
    """The group as one that keeps all its channels: only its producers are left, filter by filter."""
    first = group.with_role("producer")[0]
    channels = sum(len(own) for own in first.index)
    members = [Member(m.layer, m.role, tuple((i,) for own in m.index for i in own), m.cuts)
               for m in group.with_role("producer") if sum(len(own) for own in m.index) == channels]
    return Group(group.name, channels, tuple(members), reason)


def _named(groups: list[Group]) -> list[Group]:
    """Groups under their first producer's name; where it produces several groups, with the range of its filters."""
    names = [group.name for group in groups]
    found: list[Group] = []
    for group in groups:
        name, index = group.name, [i for own in _first(group).index for i in own]
        if names.count(name) > 1:
            name = f"{name}[{min(index)}:{max(index) + 1}]"
        taken = sum(other.name.partition(" ")[0] == name for other in found)
        found.append(Group(f"{name} ({taken + 1})" if taken else name, group.channels, group.members, group.protected))
    return found


def _places(trace: Trace, called: list[str]) -> dict[int, list[Place]]:
    """Set of channels -> where they are."""
    sets, found = trace.channels.sets(), defaultdict(list)
    for (layer, role), axes in _by_layer(trace, called).items():
        alike: dict[bytes, list[Axis]] = defaultdict(list)  # tensors whose channels are the same, as those of a norm
        for axis in axes:
            alike[sets[axis.first:axis.first + axis.size].tobytes()].append(axis)
        for same in alike.values():
            own, cuts = _own_channels(trace, same[0], role), _cuts(trace, layer, role, same)
            numbers = sets[same[0].first:same[0].first + same[0].size]
            order = np.argsort(numbers, kind="stable")
            starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
            for number, index in zip(numbers[order[starts]].tolist(), np.split(order, starts[1:])):
                channels = tuple(sorted(channel for i in index.tolist() for channel in own(i)))
                found[number].append(Place(layer, role, channels, cuts))
    return found


def _by_layer(trace: Trace, called: list[str]) -> dict[tuple[str, str], list[Axis]]:
    """Layer and role -> the axes of its tensors that have channels; a layer's bias goes with its outputs."""
    found: dict[tuple[str, str], list[Axis]] = defaultdict(list)
    for axis in trace.channels.axes.values():
        layer, _, tensor = axis.tensor.rpartition(".")
        if tensor != "bias" or not isinstance(trace.network.get_submodule(layer), LAYERS):
            found[layer, _role(trace, axis, layer, called)].append(axis)
    return found


def _cuts(trace: Trace, layer: str, role: str, axes: list[Axis]) -> tuple[tuple[str, int], ...]:
    """Tensors and axes to slice."""
    bias = f"{layer}.bias" in trace.sizes and role in ("producer", "depthwise")
    return tuple((axis.tensor.rpartition(".")[2], axis.axis) for axis in axes) + ((("bias", 0),) if bias else ())


def _role(trace: Trace, axis: Axis, layer: str, called: list[str]) -> str:
    use = trace.uses.get(axis.tensor)
    if not isinstance(trace.network.get_submodule(layer), LAYERS) or use is None:
        return "norm"
    if use.depthwise:
        return "depthwise"
    return "auxiliary" if layer not in called else "producer" if axis.axis == use.outputs else "consumer"


def _own_channels(trace: Trace, axis: Axis, role: str):
    """A function from indices of an axis to the layer's own channels: a grouped weight has those of one group."""
    use = trace.uses.get(axis.tensor)
    if use is None or role in ("norm", "depthwise"):
        return lambda i: (i,)
    transposed = isinstance(trace.network.get_submodule(axis.tensor.rpartition(".")[0]), TRANSPOSED)
    count = use.groups if (axis.axis == use.outputs) == transposed else 1
    return lambda i: tuple(range(i, count * axis.size, axis.size))


def _pin_what_no_group_can_have(trace: Trace) -> None:
    """Weights of other modules than layers, shared weights, layers that are called several times."""
    owners = defaultdict(list)
    for name, tensor in trace.network.state_dict(keep_vars=True).items():
        owners[id(tensor)].append(name)
    shared = {names[0]: names[1:] for names in owners.values() if len(names) > 1}
    for axis in list(trace.channels.axes.values()):
        layer, _, tensor = axis.tensor.rpartition(".")
        module = trace.network.get_submodule(layer)
        why = []
        if axis.tensor in shared:
            why.append(f"{axis.tensor} is also {', '.join(shared[axis.tensor])} (tied weights stay tied)")
        if axis.tensor in trace.uses and not (isinstance(module, LAYERS) and tensor == "weight"):
            why.append(f"{type(module).__name__} {layer or 'itself'} multiplies by its own {tensor}; write that as a "
                       "convolution or linear layer to have it cut")
        elif axis.tensor in trace.uses and layer not in trace.order:
            why.append(f"{axis.tensor} is used without a call of its layer; call {layer} instead")
        if trace.calls.get(axis.tensor, 0) > 1:
            why.append(f"{layer} is called {trace.calls[axis.tensor]} times")
        for reason in why:
            trace.channels.pin(trace.channels.nodes(axis.tensor, axis.axis, axis.size), reason)

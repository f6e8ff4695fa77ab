"""Dependencies and physical removal of channels, by torch-pruning (Fang et al., DepGraph, CVPR 2023).

The only module that imports torch_pruning.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch_pruning as tp
from torch import Tensor, nn

from hobs_rspar import cost
from hobs_rspar.coupling import ROLES, Group, Groups, Member
from hobs_rspar.errors import UserError

NORMS = (nn.BatchNorm2d,)


def groups(network: nn.Module, example: Tensor, protect: Sequence[str] = ()) -> Groups:
    """Finds the groups of a network.

    Args:
        network: traced, not changed.
        example: input [1, C, H, W].
        protect: names of layers whose groups keep all their channels.

    Returns:
        Groups in order of execution. ``print`` shows what is coupled to what.

    Raises:
        UserError: the network cannot be traced; a protected layer is not in any group.
    """
    coupled = _coupled_channels(network, example)
    macs = cost.layer_macs(network, example)
    order = {name: i for i, name in enumerate(macs)}
    calls = cost.layer_calls(network, example)
    found = [_group(members, order, calls) for members in coupled]
    found = sorted((group for group in found if group is not None), key=lambda group: order[group.name])
    layers = {name: (value, *_sizes(network.get_submodule(name))) for name, value in macs.items()}
    every = Groups(found, layers)
    shielded = {every.named(name).name for name in protect}
    every.groups = [Group(g.name, g.channels, g.members, g.protected or ("as asked" if g.name in shielded else ""))
                    for g in found]
    return every


def _group(members: list[tuple[str, str, list[list[int]]]], order: dict[str, int],
           calls: dict[str, int]) -> Group | None:
    """A group of the trace; None for the network's output, which nothing consumes."""
    parts = tuple(Member(layer, role, tuple(tuple(i) for i in index)) for layer, role, index in members
                  if role in ROLES)
    producers = [part.layer for part in parts if part.role == "producer"]
    blocked = [f"{layer} is {role}" for layer, role, _ in members if role not in ROLES]
    blocked += [f"{part.layer} takes only some of the channels" for part in parts
                if part.role != "norm" and len({len(own) for own in part.index}) > 1]
    blocked += [f"{part.layer} is called {calls[part.layer]} times" for part in parts if calls.get(part.layer, 1) > 1]
    if not producers or not (blocked or any(part.role == "consumer" for part in parts)):
        return None
    if blocked:  # nothing of it is ever cut; its other members may not even have a regular index
        parts = tuple(part for part in parts if part.role == "producer" and len({len(own) for own in part.index}) == 1)
    channels = len(members[0][2])
    return Group(min(producers, key=order.__getitem__), channels, parts, "; ".join(blocked))


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs that MACs are proportional to; a depthwise layer's inputs are its outputs, counted once."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


def _coupled_channels(network: nn.Module, example: Tensor) -> list[tuple[tuple[str, str, list[list[int]]], ...]]:
    """The dependency graph's groups as plain data.

    Args:
        network: traced on a copy.
        example: input [1, C, H, W].

    Returns:
        For every group a list of (layer, role, index): role is ``producer``, ``depthwise``, ``norm`` or ``consumer``,
        or a sentence that says why the layer's channels cannot be removed; index [channels][multiplicity].

    Raises:
        UserError: the network cannot be traced.
    """
    network = copy.deepcopy(network).eval()
    graph = _graph(network, example)
    names = {part: name for name, part in (*network.named_modules(), *network.named_parameters())}
    return [_members(group, names) for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])]


def _graph(network: nn.Module, example: Tensor) -> tp.DependencyGraph:
    frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
    try:
        for parameter in frozen:  # the trace follows gradients
            parameter.requires_grad_(True)
        with torch.enable_grad():
            return tp.DependencyGraph().build_dependency(network, example_inputs=example)
    except Exception as problem:  # torch-pruning raises bare errors of many kinds for what it cannot trace
        raise UserError(f"{type(network).__name__} cannot be traced with an input of shape {list(example.shape)} "
                        f"({type(problem).__name__}: {problem}); check the input's shape, or write the operation as "
                        "a module") from problem
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _members(group, names: dict[nn.Module | nn.Parameter, str]) -> list[tuple[str, str, list[list[int]]]]:
    """Merges the trace's items per (layer, role); elementwise operations have no weights and are left out."""
    channels = len(group[0].idxs)
    merged: dict[tuple[str, str], list[list[int]]] = {}
    for item in group.items:
        module = item.dep.target.module
        name = names.get(module)
        if name is None or isinstance(module, nn.Module) and not any(True for _ in module.parameters(recurse=False)):
            continue
        role = _role(module, item.dep.handler.__name__)
        index = merged.setdefault((name, role), [[] for _ in range(channels)])
        for own, root in zip(item.idxs, item.root_idxs):
            if int(own) not in index[int(root)]:
                index[int(root)].append(int(own))
    return [(layer, role, index) for (layer, role), index in merged.items()]


def _role(module: nn.Module | nn.Parameter, handler: str) -> str:
    if isinstance(module, nn.Parameter):
        return "a bare parameter"
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return "depthwise" if module.groups == module.in_channels == module.out_channels else \
            f"a grouped convolution with {module.groups} groups"
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return "consumer" if handler == "prune_in_channels" else "producer"
    return "norm" if isinstance(module, NORMS) else f"a {type(module).__name__}"


def remove(network: nn.Module, example: Tensor, plan) -> nn.Module:
    """A physically pruned copy of ``network``.

    Args:
        network: the dense network; untouched.
        example: input [1, C, H, W].
        plan: a :class:`PruningPlan`.

    Returns:
        The smaller network, in evaluation mode.
    """
    removed = {group.name: sorted(set(range(group.channels)) - set(group.kept)) for group in plan.groups}
    return remove_filters(network, example, removed)


def remove_filters(network: nn.Module, example: Tensor, removed: dict[str, Sequence[int]]) -> nn.Module:
    """Removes output channels of layers, and what is coupled to them, from a copy of ``network``.

    Args:
        network: untouched.
        example: input [1, C, H, W].
        removed: layer name -> filter indices.

    Raises:
        UserError: a layer does not exist, an index is out of range, or a layer would lose all its filters.
    """
    pruned = copy.deepcopy(network).eval()
    graph = _graph(pruned, example)
    layers = dict(pruned.named_modules())
    for name, filters in _once(network, example, removed).items():
        layer = layers.get(name)
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            raise UserError(f"plan: '{name}' is not a convolution or linear layer of {type(network).__name__}; the "
                            "plan is for another network")
        outputs = layer.weight.shape[0]
        if filters and not 0 <= min(filters) <= max(filters) < outputs or len(set(filters)) >= outputs:
            raise UserError(f"plan: '{name}' has {outputs} filters; indices must be within 0 to {outputs - 1} and at "
                            f"least one must stay; seen: {len(set(filters))} indices, largest {max(filters)}")
        if filters:
            depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
            handler = tp.prune_depthwise_conv_out_channels if depthwise else _handler(layer)
            graph.get_pruning_group(layer, handler, idxs=sorted(set(filters))).prune()
    for parameter in pruned.parameters():
        parameter.grad = None
    return pruned


def _once(network: nn.Module, example: Tensor, removed: dict[str, Sequence[int]]) -> dict[str, list[int]]:
    """Filters to remove, coupled layers merged under the first that is named: the others lose theirs with it."""
    if len(removed) < 2:
        return {name: list(filters) for name, filters in removed.items()}
    owner = {member.layer: (g, {own[0]: channel for channel, own in enumerate(member.index)}, member)
             for g, group in enumerate(groups(network, example))
             for member in group.with_role("producer", "depthwise")}
    first: dict[int, str] = {}
    merged: dict[str, list[int]] = {}
    for name, filters in removed.items():
        if name not in owner or not set(filters) <= owner[name][1].keys():
            merged[name] = list(filters)
            continue
        g, channel_of, _ = owner[name]
        root = first.setdefault(g, name)
        merged.setdefault(root, []).extend(owner[root][2].of([channel_of[own] for own in filters]))
    return merged


def _handler(layer: nn.Module):
    return tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels


class PhysicalPruner:
    """Structural pruning by a dictionary of filters, as the published API has it.

    Args:
        model: the network to prune; untouched.
        example_input: [1, C, H, W]; random [1, 3, 224, 224] if not given.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | None = None):
        self.model = model
        self.example_input = torch.randn(1, 3, 224, 224) if example_input is None else example_input

    def prune(self, pruning_plan: dict[str, list[int]]) -> nn.Module:
        """Removes filters and everything that is coupled to them.

        Args:
            pruning_plan: layer name -> indices of the filters to remove.

        Returns:
            A physically smaller copy of the model.

        Raises:
            UserError: an unknown layer, an index out of range, or a layer that would lose all its filters.
        """
        return remove_filters(self.model, self.example_input, pruning_plan)

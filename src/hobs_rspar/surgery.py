"""Groups of a network by trace and self-check, and the published front of surgery, which removes filters by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn

from hobs_rspar import cost
from hobs_rspar.admission import check_example, check_network
from hobs_rspar.cost import LAYERS
from hobs_rspar.coupling import Group, Groups
from hobs_rspar.curvature.patches import reproduces
from hobs_rspar.errors import UserError
from hobs_rspar.protection import protected
from hobs_rspar.slicing import sliced
from hobs_rspar.structure.copies import check_copies
from hobs_rspar.structure.grouping import found_groups
from hobs_rspar.structure.noise import images_like
from hobs_rspar.structure.selfcheck import verified
from hobs_rspar.structure.trace import Trace

IMAGES = 3  # of the passes that look at layers
OUT_OF_ORDER = "does not get image after image in the first dimension of its input, or what it gets depends on the " \
    "other images or on chance: no score can tell images apart"


def groups(network: nn.Module, example: Tensor, protect: str | nn.Module | Sequence[str | nn.Module] = ()) -> Groups:
    """Finds the groups of a network, and checks each of them.

    Args:
        network: traced in evaluation and in training mode; not changed.
        example: input [1, C, H, W].
        protect: layers whose groups keep all their channels, by name or as modules, one or several.

    Returns:
        Groups in order of execution. ``print`` shows what is coupled to what, and why a group is kept whole.

    Raises:
        UserError: the network cannot be run, copied or cut; a protected layer does not exist.
    """
    check_network(network)
    example = example.detach().clone() if isinstance(example, Tensor) else example  # a forward may change its input
    if isinstance(example, Tensor) and example.numel() == 0:
        raise UserError(f"the example must hold an image [n, C, H, W]; its shape is {list(example.shape)}")
    check_example(network, example.clone() if isinstance(example, Tensor) else example)
    check_copies(network, example)
    shielded = set(protected(network, protect))
    macs = cost.layer_macs(network, example)
    layers = {name: (value, *_sizes(network.get_submodule(name))) for name, value in macs.items()
              if name != cost.OTHERS}
    found = Groups(found_groups(_traced(network, example[:1]), list(layers)), layers, macs.get(cost.OTHERS, 0))
    found = verified(network, example, found)
    _look_at_layers(network, example, found)
    found.groups = [replace(group, protected="as asked") if not group.protected and shielded & _made_by(group)
                    else group for group in found]
    return found


def _traced(network: nn.Module, example: Tensor) -> Trace:
    """The trace of both modes; a network that cannot be trained on two random images is traced in one."""
    network = copy.deepcopy(network)
    trace = Trace(network.eval())
    trace.run(example)
    network.train()
    with suppress(Exception):  # whatever the user's forward may raise: nothing else than the network itself decides
        trace.run(torch.cat([example, images_like(example, 1, 3)]))
    return trace


def _made_by(group: Group) -> set[str]:
    return {member.layer for member in group.with_role("producer", "depthwise")}


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs that MACs are proportional to; a depthwise layer's inputs are its outputs, counted once."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels


@torch.no_grad()
def _look_at_layers(network: nn.Module, example: Tensor, found: Groups) -> None:
    """Sees which layers their patches describe, and that the inputs of consumers are in order: image by image."""
    names = [name for name in found.layers if any(m.layer == name for group in found for m in group.members)]
    x, other = (images_like(example, IMAGES, seed) for seed in (1, 4))
    inputs = _seen(network, x, names, found.opaque)
    changed = _seen(network, torch.cat([x[:1], other[1:]]), names, {})
    for i, group in enumerate(found.groups):
        for member in group.with_role("consumer") if not group.protected else ():
            one, two = inputs[member.layer], changed[member.layer]
            mine = len(one) // IMAGES
            if len(one) % IMAGES or not torch.allclose(one[:mine], two[:mine], rtol=1e-3, atol=1e-4):
                found.groups[i] = replace(group, protected=f"{member.layer} {OUT_OF_ORDER}")


def _seen(network: nn.Module, x: Tensor, names: list[str], opaque: dict[str, str]) -> dict[str, Tensor]:
    """Inputs of layers; those that their patches do not describe are put into ``opaque``."""
    found: dict[str, Tensor] = {}

    def look(name: str, layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        found[name] = inputs[0].clone()
        if why := reproduces(layer, inputs[0], out):
            opaque[name] = why

    hooks = [network.get_submodule(name).register_forward_hook(
        lambda layer, inputs, out, name=name: look(name, layer, inputs, out)) for name in names]
    try:
        with cost.evaluation(network):
            network(x.clone())  # which it may change
    finally:
        for handle in hooks:
            handle.remove()
    return found


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
            pruning_plan: layer name -> indices of the filters to remove, a list, tuple, set, range, array or tensor.

        Returns:
            A physically smaller copy of the model.

        Raises:
            UserError: no such dictionary, an unknown layer, an index out of range, a layer that would lose all its
                filters, filters of a group that is kept whole (the message says why), or widths with which the network
                does not run.
        """
        if not isinstance(pruning_plan, Mapping):
            raise UserError("plan: give a dictionary {layer name: indices of the filters to remove}; seen: "
                            f"{type(pruning_plan).__name__}")
        pruning_plan = {name: _indices(name, filters) for name, filters in pruning_plan.items()}
        every = groups(self.model, self.example_input)
        gone: dict[str, set[int]] = {group.name: set() for group in every}
        for name, filters in pruning_plan.items():
            _check_filters(self.model, name, filters)
            for group, channels in _channels_of(every, name, filters):
                gone[group.name] |= channels
        for group in every:
            if len(gone[group.name]) == group.channels:
                raise UserError(f"plan: group '{group.name}' would lose all its {group.channels} channels; at least "
                                "one must stay")
        pruned = sliced(self.model, every, [sorted(set(range(g.channels)) - gone[g.name]) for g in every])
        try:
            check_example(pruned, images_like(self.example_input, 2, 5))
        except UserError as problem:
            raise UserError(f"plan: {type(self.model).__name__} does not run with the channels that it leaves; leave "
                            f"more ({problem})") from None
        return pruned


def _indices(name: str, filters) -> list[int]:
    """Whole numbers, whatever they are kept in."""
    values = filters.tolist() if hasattr(filters, "tolist") else filters
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise UserError(f"plan: '{name}' takes a list of filters to remove; seen: {filters!r:.80}")
    values = list(values)
    odd = next((value for value in values if isinstance(value, bool) or not isinstance(value, Integral)), None)
    if odd is not None:
        mask = "; of a mask give its indices, mask.nonzero()" if isinstance(odd, bool) else ""
        raise UserError(f"plan: '{name}' takes whole numbers of filters to remove; seen: {odd!r:.80}{mask}")
    return [int(value) for value in values]


def _check_filters(network: nn.Module, name: str, filters: Sequence[int]) -> None:
    layer = dict(network.named_modules()).get(name)
    if not isinstance(layer, LAYERS):
        raise UserError(f"plan: '{name}' is not a convolution or linear layer of {type(network).__name__}; the plan is "
                        "for another network")
    outputs = _sizes(layer)[0]
    if len(filters) and (not 0 <= min(filters) <= max(filters) < outputs or len(set(filters)) >= outputs):
        raise UserError(f"plan: '{name}' has {outputs} filters; indices must be within 0 to {outputs - 1} and at "
                        f"least one must stay; seen: {len(set(filters))} indices, largest {max(filters)}")


def _channels_of(every: Groups, name: str, filters: Sequence[int]) -> list[tuple[Group, set[int]]]:
    """The channels, by group, that the filters of a layer are."""
    left, found = set(filters), []
    for group in every:
        for member in group.with_role("producer", "depthwise"):
            channels = {c for c, own in enumerate(member.index) if left & set(own)} if member.layer == name else set()
            if channels and group.protected:
                raise UserError(f"plan: '{name}' cannot lose filters: its group is kept whole ({group.protected})")
            if channels:
                found.append((group, channels))
                left -= set(member.of(sorted(channels)))
    if left:
        raise UserError(f"plan: '{name}' cannot lose filters {sorted(left)[:8]}: no layer takes them (the network "
                        "returns them), or they are coupled to what stays; see print(groups(model, example))")
    return found

"""Which layers a caller wants to keep whole: names or modules, one or several, layers or whole blocks."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hobs_rspar.cost import LAYERS
from hobs_rspar.errors import UserError, did_you_mean

SHOWN = 12  # names in a message


def protected(model: nn.Module, protect) -> list[str]:
    """Names of the convolutions and linear layers that a caller wants to keep whole.

    Args:
        model: the network.
        protect: names or modules, one or several; a block stands for all layers in it.

    Returns:
        The layers' names, in the network's order, each once.

    Raises:
        UserError: a name or module is not in the network, or has no channels of its own.
    """
    one = protect is None or isinstance(protect, (str, nn.Module))
    if not one and not isinstance(protect, Iterable):
        raise UserError(f"protect takes names of layers or modules, one or several; seen: {protect!r}")
    wanted = {name for item in ([protect] if one and protect is not None else protect or ())
              for name in _layers_of(model, item)}
    return [name for name, _ in model.named_modules() if name in wanted]


def _layers_of(model: nn.Module, item) -> list[str]:
    """The layers that one entry of ``protect`` means."""
    names = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    if not isinstance(item, (str, nn.Module)):
        raise UserError(f"protect takes names of layers or modules; seen: {item!r}")
    if isinstance(item, str) and item not in names:
        layers = [name for name, module in names.items() if isinstance(module, LAYERS)]
        raise UserError(f"protect: '{item}' is not a layer of {type(model).__name__}.{did_you_mean(item, names)} "
                        f"Layers: {', '.join(layers[:SHOWN])}")
    block = names[item] if isinstance(item, str) else item
    if all(block is not module for module in model.modules()):
        raise UserError(f"protect: this {type(block).__name__} is not a part of the network that is pruned; give its "
                        f"name, or the module of that very {type(model).__name__}")
    inside = {id(module) for module in block.modules() if isinstance(module, LAYERS)}
    if not inside:
        raise UserError(f"protect: {item if isinstance(item, str) else type(item).__name__} makes no channels of its "
                        "own; name the convolution or linear layer before it")
    return [name for name, module in model.named_modules() if id(module) in inside]

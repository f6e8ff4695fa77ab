"""What the public API takes: a network that can be copied and cut, and an example that it runs on.

Every refusal is one sentence with the remedy, and comes before anything expensive.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from hobs_rspar import cost
from hobs_rspar.errors import UserError

# By the names of classes: importing torch's compiler and its distributed package takes seconds.
WRAPPERS = {
    "OptimizedModule": ("compiled by torch.compile", "give its ._orig_mod, and compile the pruned network"),
    "ScriptModule": ("scripted or traced", "give the network that it was made from, and script the pruned one"),
    "DataParallel": ("wrapped in DataParallel", "give its .module, and wrap the pruned network"),
    "DistributedDataParallel": ("wrapped in DistributedDataParallel", "give its .module, and wrap the pruned network"),
    "FullyShardedDataParallel": ("sharded", "load the full state dict into a network of its own, and give that"),
    "FSDPModule": ("sharded", "load the full state dict into a network of its own, and give that"),
}
OLD_HOOKS = {"WeightNorm": "torch.nn.utils.remove_weight_norm({layer}, '{tensor}')",
             "SpectralNorm": "torch.nn.utils.remove_spectral_norm({layer}, '{tensor}')"}


def check_network(model) -> None:
    """Refuses what cannot be copied and cut, whatever its input.

    Args:
        model: what the caller gave for a network; untouched.

    Raises:
        UserError: it is no network of float32 parameters on one device, or it is wrapped, compiled, quantized,
            parametrized, or cannot be copied. The message says which layer, and what to do.
    """
    _refuse(model, (_wrapped, _quantized, _lazy, _meta, _parameters, _reparametrised, _uncopied))


def check_visible(model) -> None:
    """Refuses networks whose layers cannot be seen: no module, compiled, scripted, quantized or without values.

    Raises:
        UserError: as :func:`check_network`.
    """
    _refuse(model, (_wrapped, _quantized, _lazy, _meta))


def check_copy(model) -> None:
    """Refuses networks that cannot be copied, or have no values yet.

    Raises:
        UserError: as :func:`check_network`.
    """
    _refuse(model, (_lazy, _meta, _uncopied))


def check_shapes(model) -> None:
    """Refuses what is no network, and lazy layers that have no shapes yet.

    Raises:
        UserError: as :func:`check_network`.
    """
    _refuse(model, (_lazy,))


def _refuse(model, faults: Sequence[Callable[[nn.Module], str]]) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be a torch.nn.Module; {_not_a_network(model)}")
    for fault in faults:
        found = fault(model)
        if found:
            raise UserError(f"{type(model).__name__}: {found}")


def check_example(model: nn.Module, example: Tensor):
    """Runs the network once in evaluation mode.

    Args:
        model: that passed :func:`check_network`; untouched.
        example: input [n, C, H, W] on the network's device.

    Returns:
        The network's output, whatever it is.

    Raises:
        UserError: the network cannot run on it; the message names the layer and the cause.
    """
    if not isinstance(example, Tensor):
        raise UserError(f"the example must be a tensor of images [n, C, H, W]; seen: {type(example).__name__}. A "
                        "network of several inputs needs a wrapper with one")
    if example.dim() == 3 and any(isinstance(module, nn.Conv2d) for module in model.modules()):
        raise UserError(f"the example must be a batch [n, C, H, W]; its shape is {list(example.shape)}: give "
                        "example[None]")
    try:
        with cost.evaluation(model), torch.no_grad():
            return model(example)
    except Exception as problem:  # whatever a user's forward raises
        raise UserError(_failure(model, example, problem)) from problem


def _not_a_network(model) -> str:
    if isinstance(model, type):
        return f"{model.__name__} is a class: give an instance, {model.__name__}(...)"
    if isinstance(model, Mapping):
        return f"seen: {type(model).__name__}: build the network, call its load_state_dict, and give the network"
    if callable(getattr(model, "module", None)):
        return f"seen: {type(model).__name__}: give the network that it was made from"
    if callable(model):
        return "this is a function: give the network that it calls (of a compiled function: the network itself)"
    return f"seen: {type(model).__name__}"


def _called(name: str) -> str:
    return f"its part '{name}'" if name else "the network"


def _wrapped(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if kind.__name__ in WRAPPERS and kind.__module__.startswith("torch."):
                what, remedy = WRAPPERS[kind.__name__]
                return f"{_called(name)} is {what}; {remedy}"
        if any(kind.__module__.startswith("torch.export") for kind in type(module).__mro__):
            return f"{_called(name)} comes from torch.export; give the network that was exported"
        if getattr(module, "_compiled_call_impl", None) is not None:
            return f"{_called(name)} was compiled by its method compile(); give copy.deepcopy(model), which is not"
    return ""


def _quantized(model: nn.Module) -> str:
    for name, module in model.named_modules():
        place = type(module).__module__.split(".")
        if place[0] == "torch" and "quantized" in place:
            return f"{_called(name)} is a quantized {type(module).__name__}; prune the float network, then quantize it"
    return ""


def _lazy(model: nn.Module) -> str:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            return f"'{name}' has no shape yet (a lazy layer); run the network once on a batch of images first"
    return ""


def _meta(model: nn.Module) -> str:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device.type == "meta":
            return (f"'{name}' is on the meta device and has no values; call model.to_empty(device='cpu') and load the "
                    "weights first")
    return ""


def _parameters(model: nn.Module) -> str:
    """What is wrong with the parameters: none, of another kind than float32, or not all on one device."""
    named = dict(model.named_parameters())
    if not named:
        return "it has no parameters, so there is nothing to prune"
    for name, parameter in named.items():
        if nn.Parameter not in type(parameter).__mro__:
            return (f"'{name}' is a {type(parameter.data).__name__}, not a plain tensor; give a network with plain "
                    "float32 parameters")
        if parameter.dtype != torch.float32 and (parameter.is_floating_point() or parameter.is_complex()):
            return (f"'{name}' is {str(parameter.dtype).removeprefix('torch.')}, and float32 is needed; give "
                    "model.float(), and cast the pruned network")
    devices = {str(parameter.device): name for name, parameter in named.items()}
    if len(devices) > 1:
        seen = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
        return f"its parameters are on several devices ({seen}); give model.to('cpu'), or all of it on one GPU"
    return ""


def _reparametrised(model: nn.Module) -> str:
    """A layer whose weight is computed from other tensors: cutting it would cut what is computed."""
    for name, module in model.named_modules():
        layer = f"model.get_submodule('{name}')"
        if parametrize.is_parametrized(module):
            tensor = next(iter(module.parametrizations))
            return (f"'{name}.{tensor}' is parametrized; call torch.nn.utils.parametrize.remove_parametrizations("
                    f"{layer}, '{tensor}') first")
        for hook in module._forward_pre_hooks.values():
            kind, tensor = type(hook).__name__, getattr(hook, "_tensor_name", getattr(hook, "name", "weight"))
            if isinstance(hook, BasePruningMethod):
                return f"'{name}.{tensor}' is masked; call torch.nn.utils.prune.remove({layer}, '{tensor}') first"
            if kind in OLD_HOOKS and type(hook).__module__.startswith("torch."):
                return f"'{name}.{tensor}' is computed by a {kind} hook; call " \
                       f"{OLD_HOOKS[kind].format(layer=layer, tensor=tensor)} first"
        if isinstance(module, cost.LAYERS) and "weight" not in {**module._parameters, **module._buffers}:
            return f"the weight of '{name}' is computed, not a parameter; give it a parameter of its own"
    return ""


def _uncopied(model: nn.Module) -> str:
    try:
        copy.deepcopy(model)
    except Exception as problem:  # whatever a user's attribute raises
        return (f"it cannot be copied ({_line(problem)}){_culprit(model)}; keep no tensors with a gradient history, "
                "files, locks or generators in a module, or give them to copy.deepcopy")
    return ""


def _culprit(model: nn.Module) -> str:
    """The first attribute that cannot be copied by itself."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                return f", because of '{key}' of {_called(name)}"
    return ""


def _failure(model: nn.Module, example: Tensor, problem: Exception) -> str:
    """Why a forward pass fails, and in which layer; the input is blamed only where it is to blame."""
    kind, shape = type(model).__name__, tuple(example.shape)
    name, layer, x = _failing(model, example)
    fault = _unfit(layer, x)
    if fault:
        return (f"input shape {shape} (batch first) does not fit {kind}: '{name}' takes {fault} and gets "
                f"{list(x.shape)}; give images as the network was trained on")
    inside = f" in '{name}'" if name else ""
    return (f"{kind} does not run{inside}, on an input of shape {shape} in evaluation mode: {_line(problem)}; "
            "model.eval()(images) must run by itself")


def _unfit(layer: nn.Module, x: Tensor) -> str:
    """What a layer takes, if it cannot take ``x`` for its shape."""
    if hasattr(layer, "in_channels") and isinstance(layer, cost.LAYERS) and \
            (x.dim() != layer.weight.dim() or x.shape[1] != layer.in_channels):
        return f"{layer.in_channels} channels, [n, {layer.in_channels}{', …' * (layer.weight.dim() - 2)}],"
    if isinstance(layer, nn.Linear) and x.shape[-1:] != (layer.in_features,):
        return f"{layer.in_features} features"
    return ""


@torch.no_grad()
def _failing(model: nn.Module, example: Tensor) -> tuple[str, nn.Module, Tensor]:
    """The innermost module that a failing forward pass was in, and what it got."""
    inside: list[tuple[str, nn.Module, Tensor]] = [("", model, example)]
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(
            lambda module, inputs, name=name: inside.append((name, module, inputs[0])) if
            inputs and isinstance(inputs[0], Tensor) else inside.append((name, model, example))))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    try:
        with cost.evaluation(model):
            model(example)
    except Exception:
        return inside[-1]
    finally:
        for hook in hooks:
            hook.remove()
    return "", model, example


def _line(problem: Exception) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__

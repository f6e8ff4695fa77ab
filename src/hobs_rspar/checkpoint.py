"""Model files: safetensors whose metadata says which network they hold. Nothing is ever unpickled.

A pruned network is rebuilt without its plan: the dense network is built by name, and every layer is shrunk to the
shapes of the stored tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hobs_rspar.errors import UserError
from hobs_rspar.networks import NetworkSpec, build

KEY = "hobs_rspar.network"  # the only key of the metadata: safetensors writes several in a random order


def digest(path: Path | str) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def save(path: Path | str, network: nn.Module, spec: NetworkSpec) -> None:
    """Writes ``network`` atomically; the same weights give the same bytes."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    save_tensors(path, state, {KEY: spec.to_json()})


def save_tensors(path: Path | str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes named tensors as safetensors, atomically: a reader never sees half a file, whoever else writes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial, metadata)
    partial.chmod(0o644)  # the library writes files that only their owner may read
    os.replace(partial, path)


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: the file is missing, truncated or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} not found; 'dvc repro' makes it, or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as problem:
        raise UserError(f"{path} is not a readable safetensors file ({problem}); it is truncated or of another "
                        "format. Delete it and run again, or give another file") from None


def load(path: Path | str) -> nn.Module:
    """Rebuilds the dense or pruned network of a model file, in evaluation mode.

    Raises:
        UserError: the file is unreadable, holds no network of ours, or does not fit the network that it names.
    """
    return load_with_spec(path)[0]


def load_with_spec(path: Path | str) -> tuple[nn.Module, NetworkSpec]:
    """Like :func:`load`, and what the network is."""
    state, metadata = load_tensors(path)
    if KEY not in metadata:
        raise UserError(f"{path} holds tensors, but its metadata name no network; expected a file written by this "
                        "package (dense.safetensors, pruned.safetensors, recovered.safetensors)")
    spec = NetworkSpec(**json.loads(metadata[KEY]))
    network = fit(build(spec), state, str(path))
    return network.to(memory_format=torch.channels_last), spec  # the layout that is faster throughout


def fit(network: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    """Shrinks every layer of a dense ``network`` to the shapes in ``state`` and loads the tensors.

    Args:
        network: the dense network; changed in place.
        state: a state dict of the same architecture with equal or fewer channels.
        source: what to name in an error.

    Returns:
        The network in evaluation mode.

    Raises:
        UserError: names differ, or a tensor has more dimensions or channels than the network's.
    """
    own = network.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unknown:
        raise UserError(f"{source} does not fit the network: {len(missing)} tensors are missing "
                        f"({', '.join(missing[:3]) or 'none'}), {len(unknown)} are unknown "
                        f"({', '.join(unknown[:3]) or 'none'}); give a checkpoint of this network")
    for name, tensor in state.items():
        shape = own[name].shape
        if tensor.dim() != len(shape) or any(new > old for new, old in zip(tensor.shape, shape)):
            raise UserError(f"{source} does not fit the network: {name} has shape {list(tensor.shape)}, the network's "
                            f"is {list(shape)} (a pruned one may be smaller, never larger)")
    resized: dict[int, nn.Parameter] = {}
    for name, module in network.named_modules():
        _shrink(module, {key: state[f"{name}.{key}" if name else key] for key in _own(module)
                         if (f"{name}.{key}" if name else key) in state}, resized)
    complete = OrderedDict(state)
    complete._metadata = own._metadata  # versions of modules' formats, which a plain dictionary has lost
    network.load_state_dict(complete)
    return network.eval()


def _own(module: nn.Module) -> list[str]:
    """Names of a module's own parameters and buffers that are there."""
    named = (module.named_parameters, module.named_buffers)
    return [key for every in named for key, _ in every(recurse=False, remove_duplicate=False)]


def _shrink(module: nn.Module, tensors: dict[str, Tensor], resized: dict[int, nn.Parameter]) -> None:
    """Gives ``module`` parameters of the stored shapes, and the attributes that follow from them.

    Args:
        module: of the dense network.
        tensors: what is stored for it.
        resized: parameters that were replaced, by the identity of the old one: tied ones stay tied.
    """
    if all(getattr(module, key).shape == tensor.shape for key, tensor in tensors.items()):
        return
    before = {key: getattr(module, key).shape for key in tensors}
    for key, tensor in tensors.items():
        old = getattr(module, key)
        if key in module._parameters:
            if old.shape != tensor.shape:
                new = nn.Parameter(torch.empty_like(tensor, device=old.device), old.requires_grad)
                setattr(module, key, resized.setdefault(id(old), new))
        else:
            setattr(module, key, torch.empty_like(tensor, device=old.device))
    for kinds, resize in RESIZED.items():
        if isinstance(module, kinds):
            resize(module, before, tensors)


def _resize_convolution(layer: nn.Conv2d, _before, tensors: dict[str, Tensor]) -> None:
    weight = tensors["weight"]
    if layer.groups == layer.in_channels > 1 and weight.shape[1] == 1:  # depthwise: a group for every channel
        multiplier = layer.out_channels // layer.in_channels
        layer.out_channels, layer.groups = len(weight), len(weight) // multiplier
        layer.in_channels = layer.groups
    elif layer.transposed:
        layer.in_channels, layer.out_channels = len(weight), weight.shape[1] * layer.groups
    else:
        layer.out_channels, layer.in_channels = len(weight), weight.shape[1] * layer.groups


def _resize_linear(layer: nn.Linear, _before, tensors: dict[str, Tensor]) -> None:
    layer.out_features, layer.in_features = tensors["weight"].shape


def _resize_norm(norm: nn.BatchNorm2d, _before, tensors: dict[str, Tensor]) -> None:
    norm.num_features = max(len(tensor) for tensor in tensors.values() if tensor.dim() == 1)


def _resize_group_norm(norm: nn.GroupNorm, before: dict[str, torch.Size], tensors: dict[str, Tensor]) -> None:
    norm.num_groups = len(tensors["weight"]) * norm.num_groups // before["weight"][0]  # whole norm groups went
    norm.num_channels = len(tensors["weight"])


def _resize_layer_norm(norm: nn.LayerNorm, _before, tensors: dict[str, Tensor]) -> None:
    norm.normalized_shape = tuple(tensors["weight"].shape)


def _resize_prelu(layer: nn.PReLU, _before, tensors: dict[str, Tensor]) -> None:
    layer.num_parameters = len(tensors["weight"])


RESIZED = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _resize_convolution,
    (nn.Linear,): _resize_linear, (nn.GroupNorm,): _resize_group_norm, (nn.LayerNorm,): _resize_layer_norm,
    (nn.PReLU,): _resize_prelu,
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
     nn.InstanceNorm3d): _resize_norm}

"""Model files: safetensors whose metadata says which network they hold. Nothing is ever unpickled.

A pruned network is rebuilt without its plan: the dense network is built by name, and every layer is shrunk to the
shapes of the stored tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
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
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
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
    for name, module in network.named_modules():
        _shrink(module, {key: state[f"{name}.{key}" if name else key]
                         for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]})
    network.load_state_dict(state)
    return network.eval()


def _shrink(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Gives ``module`` parameters of the stored shapes, and the attributes that follow from them."""
    if all(getattr(module, key).shape == tensor.shape for key, tensor in tensors.items()):
        return
    for key, tensor in tensors.items():
        if key in module._parameters:
            setattr(module, key, nn.Parameter(torch.empty_like(tensor)))
        else:
            setattr(module, key, torch.empty_like(tensor))
    if isinstance(module, nn.Conv2d):
        depthwise = module.groups == module.in_channels
        module.out_channels = tensors["weight"].shape[0]
        module.groups = module.out_channels if depthwise and module.groups > 1 else module.groups
        module.in_channels = tensors["weight"].shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensors["weight"].shape
    elif isinstance(module, nn.BatchNorm2d):
        module.num_features = max(len(tensor) for tensor in tensors.values() if tensor.dim() == 1)
    else:
        raise UserError(f"a {type(module).__name__} layer cannot be rebuilt with fewer channels; protect its group")

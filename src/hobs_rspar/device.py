"""Which device to compute on, and in which precision."""

from __future__ import annotations

import platform

import torch

from hobs_rspar.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device that ``params.device`` names.

    Args:
        name: ``auto`` (a GPU when there is one), ``cpu`` or ``cuda``.

    Raises:
        UserError: the name is unknown, or a GPU is asked for and PyTorch sees none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: '{name}' is not known. Allowed: auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        why = "this PyTorch is built without CUDA" if torch.version.cuda is None else "the driver shows no GPU"
        raise UserError(f"device: 'cuda' is not available here ({why}, torch {torch.__version__}). Set device to auto "
                        "or cpu in params.yaml, or run on a machine with a GPU")
    if name == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision that a ``precision`` of params means on a device: ``bf16`` (autocast) or ``fp32``.

    ``auto`` is bf16 where the device computes it in hardware, else fp32: emulated, bf16 trains several times slower.
    """
    if name == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return name


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware. On x86, AVX-512 alone is not enough: PyTorch then emulates."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """A context in which layers compute in ``precision`` (see :func:`resolve_precision`); weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=resolve_precision(precision, device) == "bf16")

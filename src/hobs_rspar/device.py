"""Which device to compute on."""

from __future__ import annotations

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

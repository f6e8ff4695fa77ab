"""Memory: how much a process has held, and how many images fit into one pass."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # progress bars are shown by processes that do without PyTorch
    from torch import Tensor, nn

try:
    import resource
except ImportError:  # not on Windows
    resource = None

BATCH = 128  # images of a pass with gradients, where they fit
ACTIVATIONS = 2**30  # bytes of all outputs of all layers in a pass; what its backward pass holds is about half of them


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; 0 where the system does not say."""
    if resource is None:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # of Linux in KiB


def batch_size(network: nn.Module, example: Tensor, most: int = BATCH) -> int:
    """Images a pass whose activations take no more than ``ACTIVATIONS`` bytes, by the outputs of a single one.

    Args:
        network: in evaluation mode; untouched.
        example: input [1, C, H, W].
        most: images of a pass with small activations.
    """
    import torch

    held = [example.numel() * example.element_size()]

    def add(_layer: nn.Module, _inputs, out) -> None:
        held.append(out.numel() * out.element_size() if isinstance(out, torch.Tensor) else 0)

    hooks = [module.register_forward_hook(add) for module in network.modules() if not any(module.children())]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for hook in hooks:
            hook.remove()
    return max(1, min(most, ACTIVATIONS // sum(held)))

"""Memory: how much a process has held, what it does with freed memory, and how many images fit into one pass."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # progress bars are shown by processes that do without PyTorch
    from torch import Tensor, nn

try:
    import resource
except ImportError:  # not on Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = (2**30, 2**25)  # bytes: enough for any activation; the most that older versions take
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


def keep_freed_memory() -> None:
    """Lets this process reuse the memory of large tensors instead of returning it after every layer.

    glibc maps every allocation above some size anew, so each activation begins with page faults; they take a good part
    of a training step on a CPU (benchmarks/memory.py measures it). Other C libraries are left as they are.
    """
    if (mallopt := _of_c("mallopt")) is not None:
        any(mallopt(M_MMAP_THRESHOLD, size) for size in KEPT)
        mallopt(M_TRIM_THRESHOLD, KEPT[0])


def return_freed_memory() -> None:
    """Gives the system the freed memory that glibc keeps; other C libraries are left as they are.

    Activations of many sizes leave holes between them. In passes of large images that is a gigabyte.
    """
    if (trim := _of_c("malloc_trim")) is not None:
        trim(0)


def _of_c(name: str):
    """A function of the C library that this process runs with, or None."""
    return None if sys.platform == "win32" else getattr(ctypes.CDLL(None), name, None)

"""Surgery cuts copies: a copy must be the network, and must use nothing of the original.

Functions that were set on a module, and hooks, may close over the network that they were made for. They go on using its
tensors in every copy, where nothing would be cut.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hobs_rspar.cost import evaluation
from hobs_rspar.errors import UserError
from hobs_rspar.structure.noise import images_like

REMEDY = "work with what the function gets (def hook(module, inputs, output), or a forward of a class of its own)"


def check_copies(network: nn.Module, example: Tensor) -> None:
    """Compares the network with a copy of it, in evaluation mode.

    Args:
        network: that can be copied; untouched.
        example: input [n, C, H, W].

    Raises:
        UserError: it is saved as something else than its tensors, a copy uses the original's tensors, or gives
            something else.
    """
    kind = type(network).__name__
    _check_state(network, kind)
    twin, images = copy.deepcopy(network), images_like(example, 2, 2)
    own = _own_tensors(network)
    with torch.no_grad():
        wanted = _outputs(network, images)
        with _Watch({tensor.untyped_storage().data_ptr(): name for name, tensor in own.items()}) as watch:
            try:
                found = _outputs(twin, images)
            except Exception:  # the original has just run
                found = []
    if watch.seen:
        raise UserError(f"{kind}: a copy of it goes on using '{watch.seen}' of the original, so that no copy can be "
                        f"cut: a hook, or a function that was set on a module, closes over the network; {REMEDY}")
    if len(wanted) != len(found) or not all(map(_same, wanted, found)):
        raise UserError(f"{kind}: a copy of it gives something else than itself: a hook, or a function that was set on "
                        f"a module, keeps what the original alone sees; {REMEDY}")


def _check_state(network: nn.Module, kind: str) -> None:
    state = network.state_dict()
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    known = _own_tensors(network)
    foreign = [name for name in state if name not in known]
    if odd or foreign:
        raise UserError(f"{kind}: its state_dict has '{(odd or foreign)[0]}', which is none of its parameters and "
                        "buffers (get_extra_state, or a state_dict of its own); give a network that is saved as its "
                        "tensors")


def _own_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for tensors in (network.named_parameters(remove_duplicate=False),
                                         network.named_buffers(remove_duplicate=False)) for name, tensor in tensors
            if tensor is not None}


def _outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    with evaluation(network), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = network(images.clone())
    return [leaf.clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()) if a.numel() else 0.0, equal_nan=True)


class _Watch(TorchDispatchMode):
    """Sees whether an operation takes one of some tensors.

    Args:
        names: by the address of their storage.

    Attributes:
        seen: the name of the first that was taken.
    """

    def __init__(self, names: dict[int, str]):
        super().__init__()
        self.names, self.seen = {place: name for place, name in names.items() if place}, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True imports the compiler, seconds of every process

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not self.seen:
                self.seen = self.names.get(leaf.untyped_storage().data_ptr(), "")
        return func(*args, **(kwargs or {}))

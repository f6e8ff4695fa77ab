"""The trace: runs a network once and follows every channel, element by element, through its operations.

Operations are seen where PyTorch has taken them apart already (the aten level), so that modules, functions and methods
of tensors are all the same. What only moves elements is carried out on their labels, too: any permutation, flattening,
concatenation or shuffle comes out as it is. Element-wise operations unite the channels that meet; layers begin new
ones; what mixes channels, or is not known, pins them. A trace is optimistic where values matter: the self-check
(:mod:`hobs_rspar.structure.selfcheck`) verifies it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from hobs_rspar.cost import LAYERS, without_fast_paths
from hobs_rspar.errors import UserError
from hobs_rspar.structure import labels
from hobs_rspar.structure.channels import Channels
from hobs_rspar.structure.ends import lost, tensors_in
from hobs_rspar.structure.labels import Part
from hobs_rspar.structure.layers import Use
from hobs_rspar.structure.rules import rule_of


class Trace(TorchDispatchMode):
    """Follows channels while it is active; several passes (evaluation, training) add to the same channels.

    Args:
        network: whose parameters and persistent buffers have nodes.

    Attributes:
        channels: what hangs together.
        uses: weight -> how its layer uses it.
        order: names of modules in the order in which they are first called.
        sizes: parameter or buffer -> its shape.
        calls: weight -> how often it is used in a pass, at most.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.channels = network, Channels()
        self.uses: dict[str, Use] = {}
        self.order: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self._stack: list[str] = []
        self._known = WeakTensorKeyDictionary()
        self.sizes = {name: tensor.shape for name, tensor in stored(network).items()}
        for name, tensor in stored(network).items():
            self._known[tensor] = Part(name, {axis: labels.along(torch.arange(size), axis, tensor.shape)
                                              for axis, size in enumerate(tensor.shape) if size > 1})

    def run(self, *inputs: Tensor):
        """One pass; what it returns is pinned."""
        self._count = {}
        with torch.no_grad(), self._watching_modules(), without_fast_paths(), self:
            out = self.network(*inputs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.pin(tensor, OUTPUT)
        self.calls = {name: max(self.calls.get(name, 0), self._count.get(name, 0))
                      for name in {**self.calls, **self._count}}
        return out

    @property
    def where(self) -> str:
        """The innermost module that is running."""
        return self._stack[-1] if self._stack and self._stack[-1] else "the network's forward"

    def get(self, tensor) -> Tensor | Part | None:
        return self._known.get(tensor) if isinstance(tensor, Tensor) else None

    def labels(self, tensor) -> Tensor | None:
        """The labels of an activation; None if no channel is in it."""
        found = self.get(tensor)
        return found if isinstance(found, Tensor) else None

    def put(self, tensor: Tensor, found: Tensor | Part | None) -> None:
        """Remembers what a tensor is; None: nothing that matters."""
        if found is None:
            self._known.pop(tensor, None)
        else:
            self._known[tensor] = found

    def nodes(self, part: Part, axis: int) -> Tensor:
        """The nodes of a parameter's axis that its elements belong to."""
        index = part.coordinates[axis]
        nodes = self.channels.nodes(part.name, axis, self.sizes[part.name][axis])
        return nodes[labels.compact(index)[0]].expand(index.shape)

    def pin(self, tensor, reason: str) -> None:
        """The channels of a tensor cannot be removed."""
        found = self.labels(tensor)
        if found is not None:
            self.channels.pin(labels.compact(found)[0], reason)

    def used(self, name: str, use: Use) -> None:
        """A layer uses a weight."""
        self._count[name] = self._count.get(name, 0) + 1
        if self.uses.setdefault(name, use) != use:
            for axis, size in enumerate(self.sizes[name]):
                self.channels.pin(self.channels.nodes(name, axis, size), f"{self.where} uses {name} in two ways")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True imports the compiler, seconds of every process

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        try:
            rule_of(func)(self, func, args, kwargs, out)
        except Exception as problem:  # a form of the operation that its rule does not foresee: channels end here
            how = f"'{func.overloadpacket.__name__}' in a form that is not followed ({type(problem).__name__})"
            lost(self, tensors_in((*args, *kwargs.values())), out, f"{self.where} uses {how}")
        return out

    @contextmanager
    def _watching_modules(self) -> Iterator[None]:
        hooks = []
        for name, module in self.network.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda module, inputs, name=name:
                                                          self._enter(name, module, inputs)))
            hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            yield
        finally:
            self._stack.clear()
            for handle in hooks:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: tuple) -> None:
        if isinstance(module, LAYERS) and not inputs:
            raise UserError(f"'{name}' of {type(self.network).__name__} gets its input by keyword, which no hook sees; "
                            f"call {name}(x) in place of {name}(input=x)")
        self._stack.append(name)
        self.order.setdefault(name, len(self.order))

    def _leave(self) -> None:
        self._stack.pop()


OUTPUT = "the network returns it"


def stored(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers with more than one element, by the first of their names."""
    state = network.state_dict(keep_vars=True)
    found: dict[int, str] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel() > 1:
            found.setdefault(id(tensor), name)
    return {name: state[name] for name in found.values()}

"""The trace is not believed: free groups are cut once and masked once on random images, and both must agree.

A masked channel is one whose consumers' weights for it are zero; layer norms take their statistics over what is left.
Compared are the outputs of every layer, restricted to the channels that stay, in evaluation and in training mode, for
two draws of widths. A group that fails, alone or together with others, stays whole, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hobs_rspar import checkpoint
from hobs_rspar.cost import LAYERS, without_fast_paths
from hobs_rspar.coupling import Group, Groups
from hobs_rspar.errors import UserError
from hobs_rspar.structure.grouping import whole
from hobs_rspar.structure.noise import images_like

IMAGES = 3  # enough for batch statistics; their order must not matter to a layer
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-2}  # largest difference, relative to the largest value of a layer
LARGE = 2**25  # parameters; a network with more is compared in single precision, its copies take half the memory
SIZES = "take sizes from the tensors (x.shape, flatten(1)) in place of numbers, or leave it whole"


@dataclass
class Seen:
    """What one pass showed: the outputs of every layer [channels, ...], call by call, and what the network returned."""

    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    returned: list[Tensor] = field(default_factory=list)


def verified(network: nn.Module, example: Tensor, groups: Groups) -> Groups:
    """The groups, of which those that do not behave as traced are kept whole.

    Args:
        network: traced; untouched.
        example: input [1, C, H, W]; the images of the check have its values, in a random order.
        groups: as traced.
    """
    check = _Check.of(network, example, groups)
    while failure := check.failure(check.free):
        culprits = {name: alone for name in check.free if (alone := check.failure([name]))}
        check.block(culprits or check.last_of_a_prefix(failure))
    return Groups(check.groups.values(), groups.layers, groups.fixed_macs, groups.opaque)


class _Check:
    """Compares cut and masked copies of one network.

    Args:
        network: in the precision of the comparison.
        images: random [IMAGES, C, H, W].
        groups: as traced.
        modes: training flags in which the dense network runs.
    """

    def __init__(self, network: nn.Module, images: Tensor, groups: Groups, modes: Sequence[bool]):
        self.network, self.images, self.modes = network, images, modes
        self.every, self.groups = groups, {group.name: group for group in groups}

    @classmethod
    def of(cls, network: nn.Module, example: Tensor, groups: Groups) -> _Check:
        """In double precision where the network can be computed in it.

        Raises:
            UserError: the network cannot be run on several images.
        """
        images = images_like(example, IMAGES, 0)
        small = sum(parameter.numel() for parameter in network.parameters()) < LARGE
        for dtype in (torch.float64, torch.float32) if small else (torch.float32,):
            twin = copy.deepcopy(network).to(dtype)
            problems = [_fails(twin, images.to(dtype), training) for training in (False, True)]
            if not any(problems):
                return cls(twin, images.to(dtype), groups, (False, True))
        if problems[0]:
            raise UserError(f"{type(network).__name__} cannot be run on {IMAGES} images of shape "
                            f"{list(example.shape[1:])} ({problems[0]}); {SIZES}")
        return cls(twin, images, groups, (False,))  # a network that cannot be trained on such images as it is

    @property
    def free(self) -> list[str]:
        """Names of the groups that are not kept whole."""
        return [name for name, group in self.groups.items() if not group.protected]

    def block(self, culprits: dict[str, str]) -> None:
        for name, reason in culprits.items():
            self.groups[name] = whole(self.groups[name], reason)

    def failure(self, names: list[str]) -> str:
        """Why these groups cannot be cut together; empty if they can."""
        for draw in (0, 1) if names else ():
            gone = {name: _drawn(self.groups[name], draw) for name in names}
            if problem := self._compared(gone):
                return f"cut, {problem}"
        return ""

    def _compared(self, gone: dict[str, list[int]]) -> str:
        """What is wrong with a network that is cut like this; the masked one is only needed where that runs."""
        cut, passes = _cut(self.network, self.every, gone), []
        for training in self.modes:
            try:
                passes.append(_pass(cut, self.images, training, {}))
            except Exception as problem:  # whatever the user's forward may raise
                return f"in {_mode(training)} mode the network does not run ({_first_line(problem)}); {SIZES}"
        masked, vectors = _masked(self.network, self.groups, gone)
        for training, seen in zip(self.modes, passes):
            wanted = _pass(masked, self.images, training, vectors)
            layer = _differing(wanted, seen, _removed_outputs(self.every, gone), CLOSE[self.images.dtype])
            if layer:
                return f"in {_mode(training)} mode {layer} gives something else than with masked channels: what is " \
                       "before it depends on how many there are, or on their places"
        return ""

    def last_of_a_prefix(self, failure: str) -> dict[str, str]:
        """The first group with which those before it fail, where each by itself is fine."""
        names = self.free
        for count in range(2, len(names) + 1):
            if self.failure(names[:count]):
                return {names[count - 1]: f"together with groups before it: {failure}"}
        return {names[-1]: failure}


def _mode(training: bool) -> str:
    return "training" if training else "evaluation"


def _first_line(problem: Exception) -> str:
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0][:160] if text else 'no message'}"


def _fails(network: nn.Module, images: Tensor, training: bool) -> str:
    """Why the dense network does not run; empty if it does."""
    try:
        _pass(copy.deepcopy(network), images, training, {})
    except Exception as problem:  # whatever the user's forward may raise; another precision or mode may do
        return _first_line(problem)
    return ""


def _drawn(group: Group, draw: int) -> list[int]:
    """Channels to remove; the second draw keeps as many as the first removes."""
    random = torch.Generator().manual_seed(sum(group.name.encode()))
    count = int(torch.randint(1, max(2, group.channels), (), generator=random))
    order = torch.randperm(group.channels, generator=random).tolist()
    return sorted(order[:count] if draw == 0 else order[count:])


def _cut(network: nn.Module, groups: Groups, gone: dict[str, list[int]]) -> nn.Module:
    kept = [sorted(set(range(group.channels)) - set(gone.get(group.name, []))) for group in groups]
    return checkpoint.fit(copy.deepcopy(network), groups.sliced(network.state_dict(), kept), "self-check")


def _masked(network: nn.Module, groups: dict[str, Group], gone: dict[str, list[int]]):
    """A copy whose consumers do not see the channels, and which entries of its vectors are left: id -> mask."""
    network, vectors = copy.deepcopy(network), {}
    state = network.state_dict(keep_vars=True)
    for name, channels in gone.items():
        for member in groups[name].members:
            for tensor, axis in member.cuts:
                part = state[f"{member.layer}.{tensor}" if member.layer else tensor]
                dead = sorted({i % part.shape[axis] for i in member.of(channels)})
                if member.role in ("consumer", "auxiliary"):
                    part.data.index_fill_(axis, torch.tensor(dead, device=part.device), 0)
                elif member.role == "norm":
                    mask = vectors.setdefault(id(part), torch.ones(part.shape, dtype=torch.bool, device=part.device))
                    mask.index_fill_(axis, torch.tensor(dead, device=part.device), False)
    return network, vectors


class _Steady(TorchDispatchMode):
    """Passes without chance (dropout keeps everything), in which layer norms see only what is left of their vectors."""

    def __init__(self, vectors: dict[int, Tensor]):
        super().__init__()
        self.vectors = vectors

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and True imports the compiler, seconds of every process

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "bernoulli_":
            return args[0].fill_(1)
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "native_layer_norm" and id(args[2]) in self.vectors:
            return _layer_norm(*args, self.vectors[id(args[2])])
        return func(*args, **(kwargs or {}))


def _layer_norm(x: Tensor, shape, weight: Tensor, bias: Tensor | None, eps: float, mask: Tensor):
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = (x * mask).sum(dims, keepdim=True) / mask.sum()
    rstd = (((x - mean) * mask).square().sum(dims, keepdim=True) / mask.sum() + eps).rsqrt()
    out = (x - mean) * rstd * weight
    return out if bias is None else out + bias, mean, rstd


def _pass(network: nn.Module, images: Tensor, training: bool, vectors: dict[int, Tensor]) -> Seen:
    """One pass of a network that nobody needs afterwards."""
    seen = Seen()
    with _recorded(network.train(training), seen), without_fast_paths(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with torch.no_grad(), _Steady(vectors):
            out = network(images.clone())  # which it may change
    seen.returned = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    return seen


@contextmanager
def _recorded(network: nn.Module, seen: Seen) -> Iterator[None]:
    def keep(name: str, layer: nn.Module, out) -> None:  # a copy: a later operation may change it in place
        dim = -1 if isinstance(layer, nn.Linear) else 1
        seen.outputs.setdefault(name, []).append(out.movedim(dim, 0).clone())

    hooks = [layer.register_forward_hook(lambda layer, _inputs, out, name=name: keep(name, layer, out))
             for name, layer in network.named_modules() if isinstance(layer, LAYERS)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _removed_outputs(groups: Groups, gone: dict[str, list[int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for group in groups:
        for member in group.with_role("producer", "depthwise") if group.name in gone else ():
            found.setdefault(member.layer, []).extend(member.of(gone[group.name]))
    return found


def _differing(wanted: Seen, seen: Seen, removed: dict[str, list[int]], close: float) -> str:
    """The first layer whose outputs differ, or what the network returns; empty if nothing does."""
    for name, outputs in wanted.outputs.items():
        others = seen.outputs.get(name, [])
        if len(others) != len(outputs):
            return name
        for out, other in zip(outputs, others):
            if not _close(_without(out, removed.get(name, [])), other, close):
                return name
    if len(wanted.returned) != len(seen.returned):
        return "the network"
    return "" if all(map(lambda a, b: _close(a, b, close), wanted.returned, seen.returned)) else "the network"


def _without(out: Tensor, gone: list[int]) -> Tensor:
    alive = torch.ones(len(out), dtype=torch.bool, device=out.device)
    alive[gone] = False
    return out[alive]


def _close(wanted: Tensor, seen: Tensor, close: float) -> bool:
    if wanted.shape != seen.shape:
        return False
    if wanted.numel() == 0 or not wanted.is_floating_point():
        return bool(torch.equal(wanted, seen))
    return bool((wanted - seen).abs().max() <= close * wanted.abs().max().clamp_min(1e-30))

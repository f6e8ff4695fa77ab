"""Small networks, images and inputs that several tests share. Everything is made from seeds; nothing is downloaded."""

from __future__ import annotations

import copy
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar import checkpoint, networks, surgery, training
from hobs_rspar.allocation.space import Space
from hobs_rspar.compression import MemoryInputs
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import statistics
from hobs_rspar.data import Images
from hobs_rspar.methods._protocol import Context
from hobs_rspar.networks import NetworkSpec
from hobs_rspar.plan import GroupPlan, PruningPlan

OWN = NetworkSpec("own", 4, 2, 9)  # what the networks of this file take
ZOO = {
    "resnet8": NetworkSpec("resnet8", 10, 1, 28),
    "resnet20": NetworkSpec("resnet20", 10, 1, 28),
    "vgg16_bn_cifar": NetworkSpec("vgg16_bn_cifar", 10, 3, 32),
    "resnet18": NetworkSpec("resnet18", 10, 3, 64),
    "resnet50": NetworkSpec("resnet50", 10, 3, 64),
    "mobilenet_v2": NetworkSpec("mobilenet_v2", 10, 3, 64),
    "efficientnet_b0": NetworkSpec("efficientnet_b0", 10, 3, 64),
}


class Mixed(nn.Module):
    """Stride, dilation, depthwise, bias, batch norm, a residual stream and a flattened linear layer, on 9x9 images."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 8, 1)
        self.expand_bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_bn = nn.BatchNorm2d(8)
        self.project = nn.Conv2d(8, 6, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(6)
        self.down = nn.Conv2d(6, 5, 3, stride=2, padding=2, dilation=2)
        self.hidden = nn.Linear(5 * 5 * 5, 7)
        self.out = nn.Linear(7, classes)

    def forward(self, x: Tensor) -> Tensor:
        stream = F.relu(self.stem_bn(self.stem(x)))
        y = F.relu(self.expand_bn(self.expand(stream)))
        y = F.relu(self.depthwise_bn(self.depthwise(y)))
        stream = F.relu(stream + self.project_bn(self.project(y)))
        y = F.relu(self.down(stream)).flatten(1)
        return self.out(F.relu(self.hidden(y)))


class Joined(nn.Module):
    """Two branches, joined along the channels, normalised and consumed together: groups that share a layer."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.left = nn.Conv2d(2, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 6, 1)
        self.bn = nn.BatchNorm2d(10)
        self.join = nn.Conv2d(10, 8, 3, padding=1)
        self.out = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(torch.cat([self.left(x), self.right(x)], 1)))
        return self.out(F.relu(self.join(y)).mean((2, 3)))


class Plain(nn.Module):
    """Convolutions with biases and no batch norm: exact where batch statistics would not be."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        self.out = nn.Linear(6 * 25, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.second(F.relu(self.first(x)))).flatten(1))


class Stream(nn.Module):
    """A residual stream of 24 channels and 48 more: enough channels for statistics over them."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(2, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.inner, self.inner_bn = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.down, self.down_bn = nn.Conv2d(24, 48, 3, stride=2, bias=False), nn.BatchNorm2d(48)
        self.out = nn.Linear(48, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.inner_bn(self.inner(x)))
        return self.out(F.relu(self.down_bn(self.down(x))).mean((2, 3)))


def seeded(kind, seed: int = 0) -> nn.Module:
    """A network of ours (input [2, 9, 9]) with random weights and batch norms, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = kind()
    return randomised(network, batch(OWN, 64), seed)


@torch.no_grad()
def randomised(network: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Random affine parameters and disturbed statistics for all batch norms: no channel is zero, no signal dies."""
    random = torch.Generator().manual_seed(seed)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.copy_(0.5 + torch.rand(norm.weight.shape, generator=random))
        norm.bias.copy_(0.3 * torch.randn(norm.bias.shape, generator=random))
        norm.momentum = None
    network.train()(x)
    for norm in norms:
        spread = norm.running_var.sqrt()
        norm.running_mean += 0.3 * spread * torch.randn(spread.shape, generator=random)
        norm.running_var *= 0.6 + torch.rand(spread.shape, generator=random)
        norm.momentum = 0.1
    return network.eval()


@cache
def zoo(name: str) -> nn.Module:
    """A network of the zoo with random batch norms; shared, so leave it as it is."""
    return randomised(networks.build(ZOO[name], seed=1), batch(ZOO[name], 16))


@cache
def zoo_groups(name: str) -> Groups:
    return surgery.groups(zoo(name), ZOO[name].example())


def batch(spec: NetworkSpec, count: int = 3, seed: int = 0) -> Tensor:
    """Random images [count, C, size, size], coarse patterns under noise, so that they differ after pooling, too."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, spec.in_channels, 3, 3, generator=random)
    noise = torch.randn(count, spec.in_channels, spec.image_size, spec.image_size, generator=random)
    return F.interpolate(coarse, noise.shape[-2:], mode="bilinear") + 0.3 * noise


IMAGES = batch(OWN, 5)


def images(count: int, channels: int = 2, size: int = 9, classes: int = 4, seed: int = 0,
           wrong: float = 0.0) -> Images:
    """A problem that a small network can learn: one blurred random template per class, plus noise.

    Args:
        count: images.
        channels: of the images.
        size: edge in pixels.
        classes: labels.
        seed: other images of the same problem.
        wrong: fraction of the labels that are drawn anew; then the loss stays away from 0.
    """
    fixed = torch.Generator().manual_seed(99)
    templates = torch.rand(classes, channels, max(3, size // 3), max(3, size // 3), generator=fixed)
    templates = 60 + 140 * F.interpolate(templates, (size, size), mode="bilinear")
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=random)
    noise = 45 * torch.randn(count, channels, size, size, generator=random)
    pixels = (templates[labels] + noise).clamp(0, 255).to(torch.uint8)
    redrawn = torch.rand(count, generator=random) < wrong
    labels = torch.where(redrawn, torch.randint(classes, (count,), generator=random), labels)
    return Images(pixels, labels, torch.full((channels,), 0.5), torch.full((channels,), 0.25))


def recipe(**changes) -> SimpleNamespace:
    """A recovery recipe of one short epoch."""
    values = {"epochs": 1, "images": None, "batch_size": 32, "learning_rate": 0.05, "momentum": 0.9,
              "weight_decay": 5e-4, "warmup": 0.2, "crops": [], "flip": False, "precision": "fp32", "threads": 1}
    return SimpleNamespace(**values | changes)


def trained(network: nn.Module, train: Images, **changes) -> nn.Module:
    """A trained copy of ``network``."""
    task = training.Task(copy.deepcopy(network), train, train.first(64), recipe(**changes), 0, "test")
    training.fit(task, training.State(), lambda state: None)
    return task.network


@cache
def trained_mixed() -> nn.Module:
    """:class:`Mixed`, trained for a few epochs on :func:`images`; shared, so leave it as it is."""
    return trained(seeded(Mixed), images(1024), epochs=4)


def random_kept(groups: Groups, seed: int, least: float = 0.4) -> list[list[int]]:
    """Random channels of every group, from the fraction ``least`` (at least one channel) up to all of them."""
    random = np.random.default_rng(seed)
    kept = []
    for group in groups:
        fewest = max(1, int(least * group.channels))
        width = group.channels if group.protected or random.random() < 0.2 else \
            random.integers(fewest, group.channels + 1)
        kept.append(sorted(random.choice(group.channels, width, replace=False).tolist()))
    return kept


def plan_of(groups: Groups, kept: list[list[int]], network: str = "tiny") -> PruningPlan:
    """A plan that keeps the given channels."""
    parts = [GroupPlan(group.name, group.channels, channels, "test") for group, channels in zip(groups, kept)]
    macs = int(groups.macs(np.array([len(channels) for channels in kept])))
    return PruningPlan(network, "none", "test", 0, {"macs": macs / groups.dense_macs}, macs, groups.dense_macs, "test",
                       "none", parts)


def rebuilt(network: nn.Module, groups: Groups, kept: list[list[int]]) -> nn.Module:
    """The pruned network by slicing, without the dependency graph."""
    return checkpoint.fit(copy.deepcopy(network), groups.sliced(network.state_dict(), kept), "test")


def snapshot(network: nn.Module) -> dict:
    """Everything of a network that nobody may change: tensors, modes, gradient flags, hooks, memory addresses."""
    hooks = {f"{name}.{kind}": len(vars(module)[kind]) for name, module in network.named_modules()
             for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")}
    return {"state": {name: tensor.clone() for name, tensor in network.state_dict().items()},
            "addresses": [tensor.data_ptr() for tensor in network.state_dict().values()],
            "modes": {name: module.training for name, module in network.named_modules()},
            "gradients": {name: (p.requires_grad, p.grad is None) for name, p in network.named_parameters()},
            "hooks": hooks}


def assert_same(before: dict, after: dict) -> None:
    """Compares two snapshots."""
    assert before["state"].keys() == after["state"].keys()
    for name, tensor in before["state"].items():
        assert torch.equal(tensor, after["state"][name]), name
    for part in ("addresses", "modes", "gradients", "hooks"):
        assert before[part] == after[part], part


def sensitivity_options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"batch_size": 64, "positions": 20, "damping": 1e-3} | changes)


class WatchedInputs(MemoryInputs):
    """Inputs that remember which splits were asked for."""

    def images(self, split: str) -> Images:
        self.asked().add(split)
        return super().images(split)

    def asked(self) -> set[str]:
        return self.__dict__.setdefault("_asked", set())


@cache
def statistics_of(name: str) -> tuple[dict, dict]:
    """Gates and factors of a network of the zoo on its own images."""
    spec = ZOO[name]
    calibration = images(128, spec.in_channels, spec.image_size, spec.classes)
    return statistics.collect(zoo(name), zoo_groups(name), calibration, sensitivity_options(),
                              torch.Generator().manual_seed(0))


def context(name: str, method: str, seed: int = 42, budget: float = 0.5, parts: dict | None = None) -> Context:
    """A method's context for a network of the zoo, everything in memory; ``parts`` replaces the statistics."""
    spec = ZOO[name]
    if parts is None:
        gates, factors = statistics_of(name)
        parts = {"gates": gates, "factors": factors}
    calibration = images(128, spec.in_channels, spec.image_size, spec.classes)
    validation = images(1000, spec.in_channels, spec.image_size, spec.classes, seed=1)
    train = images(96, spec.in_channels, spec.image_size, spec.classes, seed=2)
    inputs = WatchedInputs(parts, {"train": train, "calibration": calibration, "validation": validation})
    space = Space(zoo_groups(name), budget, 0.1)
    return Context(zoo(name), spec, space, method, seed, "none", {"macs": budget}, inputs)

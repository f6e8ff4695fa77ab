"""Networks by name: CIFAR ResNets and VGG, torchvision's classifiers, and a user's own ``package.module:function``."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.config import NETWORKS
from hobs_rspar.errors import UserError, did_you_mean

CIFAR_RESNET_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build a dense network again.

    Attributes:
        name: a name of ``config.NETWORKS`` or ``package.module:function`` (called as ``function(classes)``).
        classes: number of classes.
        in_channels: channels of the input images.
        image_size: edge of the input images in pixels.
    """

    name: str
    classes: int
    in_channels: int
    image_size: int

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    def example(self) -> Tensor:
        """One black image [1, in_channels, image_size, image_size]."""
        return torch.zeros(1, self.in_channels, self.image_size, self.image_size)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution where shapes differ (He et al. 2016, option B)."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                                          nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: three stages of 16, 32 and 64 channels, for small images."""

    def __init__(self, blocks: int, classes: int, in_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class CifarVGG(nn.Module):
    """VGG-16 with batch norm for small images: one linear layer after global pooling (Simonyan & Zisserman 2015)."""

    def __init__(self, classes: int, in_channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for width in VGG16_WIDTHS:
            if width == "M":
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(in_channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def build(spec: NetworkSpec, seed: int = 0) -> nn.Module:
    """A dense network with random weights that depend on ``seed`` alone, in evaluation mode.

    Raises:
        UserError: the name is not known, or the user's function cannot be found or called.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _construct(spec).eval()


def _construct(spec: NetworkSpec) -> nn.Module:
    if spec.name in CIFAR_RESNET_BLOCKS:
        return CifarResNet(CIFAR_RESNET_BLOCKS[spec.name], spec.classes, spec.in_channels)
    if spec.name == "vgg16_bn_cifar":
        return CifarVGG(spec.classes, spec.in_channels)
    if ":" in spec.name:
        return _users_own(spec)
    if spec.name not in NETWORKS:
        raise UserError(f"network '{spec.name}' is not known.{did_you_mean(spec.name, NETWORKS)} Allowed: "
                        f"{', '.join(NETWORKS)} or package.module:function")
    network = getattr(torchvision_models(), spec.name)(num_classes=spec.classes)
    return _with_input_channels(network, spec.in_channels)


def _users_own(spec: NetworkSpec) -> nn.Module:
    module, _, function = spec.name.partition(":")
    try:
        network = getattr(importlib.import_module(module), function)(spec.classes)
    except (ImportError, AttributeError, TypeError) as problem:
        raise UserError(f"network '{spec.name}' cannot be built: {problem}. Write package.module:function, importable "
                        f"from the repository's root, that takes the number of classes") from problem
    if not isinstance(network, nn.Module):
        raise UserError(f"network '{spec.name}' returned {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _with_input_channels(network: nn.Module, in_channels: int) -> nn.Module:
    """Replaces the first convolution where images do not have three channels."""
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != in_channels:
        stem = nn.Conv2d(in_channels, first.out_channels, first.kernel_size, first.stride, first.padding,
                         bias=first.bias is not None)
        network.set_submodule(name, stem)
    return network


def torchvision_models():
    """``torchvision.models``, also with a CPU-only PyTorch.

    The registry's torchvision wheel carries operators that were compiled for CUDA; with a CPU build of PyTorch they do
    not load, and the import fails with "operator torchvision::nms does not exist". Classifiers need none of them:
    declaring the two schemas that the import looks up is enough.
    """
    try:
        import torchvision.models
    except RuntimeError as problem:
        if "torchvision::nms" not in str(problem):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_models.library = library  # the schemas vanish when the object does
        for name in [name for name in importlib.sys.modules if name.split(".")[0] == "torchvision"]:
            del importlib.sys.modules[name]
        import torchvision.models
    return torchvision.models

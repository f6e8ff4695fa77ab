"""Networks by name: CIFAR ResNets and VGG, torchvision's and timm's, and a user's own ``package.module:function``.

Whatever is built runs once on two images, in evaluation and in training mode, before anyone relies on it: a network
that does not take the data's images, or does not give one logit per class, is refused here and in one sentence.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.config import NETWORKS, NETWORKS_ALLOWED
from hobs_rspar.errors import UserError, did_you_mean

CIFAR_RESNET_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}
VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


@dataclass(frozen=True)
class NetworkSpec:
    """What is needed to build a dense network again.

    Attributes:
        name: a name of ``config.NETWORKS``, ``timm:NAME``, or ``package.module:function`` (called as
            ``function(classes)``).
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
        UserError: the name is not known, the user's function cannot be found or called, or :func:`check` refuses what
            it returns.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _construct(spec).eval()
    check(network, spec)
    return network


def check(network: nn.Module, spec: NetworkSpec, weights: str = "", backward: bool = False) -> None:
    """Runs a copy of a network on two images of the data's shape, in evaluation and in training mode.

    Args:
        network: on the CPU; stays as it is.
        spec: what the data needs.
        weights: where its weights came from, to be named in an error.
        backward: also go back through the graph of training mode, as a step of training does.

    Raises:
        UserError: it fails on the images, or returns anything but one logit per class for each.
    """
    name = f"network '{spec.name}'" + (f" with the weights of {weights}" if weights else "")
    images = torch.randn(2, *spec.example().shape[1:], generator=torch.Generator().manual_seed(0))
    for training in (False, True):
        about = f"two images {list(images.shape)} in {'training' if training else 'evaluation'} mode"
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training and backward):  # dropout draws
            try:
                out = copy.deepcopy(network).train(training)(images)  # a copy: batch norms count what they see
                if training and backward and isinstance(out, Tensor):
                    out.sum().backward()
            except Exception as problem:  # a user's code raises what it likes
                raise UserError(f"{name} fails on {about}: {said(problem)}. The data has {spec.in_channels} channels "
                                f"and {spec.image_size} x {spec.image_size} pixels: make the network take them (an "
                                "image folder's size is data.image_size)") from problem
        if complaint := _no_logits(out, spec.classes, training):
            raise UserError(f"{name} returns {complaint} (seen on {about})")


def _no_logits(out, classes: int, training: bool) -> str:
    """What is wrong with a network's output for two images, and what to do; empty if nothing is."""
    if not isinstance(out, Tensor):
        kind = type(out).__name__ + (f" of {len(out)}" if isinstance(out, (tuple, list, dict)) else "")
        when = "; recovery trains on them alone, so in training mode, too (torchvision: aux_logits=False)"
        return f"a {kind}; return the logits [images, {classes}] alone{when if training else ''}"
    if out.dim() != 2 or len(out) != 2:
        return f"a tensor {list(out.shape)}; return logits [images, {classes}], for instance by flatten(1)"
    if out.shape[1] != classes:
        return (f"{out.shape[1]} outputs per image, but the data has {classes} classes; give its last layer {classes} "
                "outputs (a function of your own gets their number), or weights of as many classes")
    return "" if out.is_floating_point() else f"{out.dtype}; return logits, floating-point numbers"


def said(problem: Exception) -> str:
    """An exception as a phrase, with the line of the user's code that raised it, where there is one."""
    libraries = (str(Path(torch.__file__).parent), str(Path(inspect.__file__).parent), __file__, "<frozen")
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__)
              if not frame.filename.startswith(libraries)]
    first = (str(problem).strip().splitlines() or ["no message"])[0]
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(problem).__name__}: {first}{place}"


def _construct(spec: NetworkSpec) -> nn.Module:
    if spec.name in CIFAR_RESNET_BLOCKS:
        return CifarResNet(CIFAR_RESNET_BLOCKS[spec.name], spec.classes, spec.in_channels)
    if spec.name == "vgg16_bn_cifar":
        return CifarVGG(spec.classes, spec.in_channels)
    if spec.name.startswith("timm:"):
        return _timms(spec)
    if ":" in spec.name:
        return _users_own(spec)
    if spec.name not in NETWORKS:
        raise UserError(f"network '{spec.name}' is not known.{did_you_mean(spec.name, NETWORKS)} Allowed: "
                        f"{NETWORKS_ALLOWED}")
    function = torchvision_models().get_model_builder(spec.name)
    network = _called(spec, function, num_classes=spec.classes, **_torchvisions_options(spec))
    return _with_input_channels(network, spec.in_channels)


def _torchvisions_options(spec: NetworkSpec) -> dict:
    """What some classifiers need to be told: to go without auxiliary heads, or how large images are."""
    if spec.name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": False}  # their own random weights take minutes to draw
    if spec.name.startswith("vit_"):
        return {"image_size": spec.image_size}
    return {"input_size": (spec.image_size, spec.image_size)} if spec.name == "maxvit_t" else {}


def _timms(spec: NetworkSpec) -> nn.Module:
    torchvision_models()  # timm imports torchvision
    try:
        import timm
    except ImportError as problem:
        raise UserError(f"network '{spec.name}' needs the package timm, and it cannot be imported ({problem}): "
                        "pip install timm") from None
    name, known = spec.name.partition(":")[2], timm.list_models()
    if name.partition(".")[0] not in known:  # a tag after a dot names weights, which are not loaded here
        raise UserError(f"network '{spec.name}': timm {timm.__version__} has no network '{name}'."
                        f"{did_you_mean(name, known)} Allowed: one of the {len(known)} names of timm.list_models()")
    config = timm.models.get_pretrained_cfg(name)
    sized = {"img_size": spec.image_size} if config is not None and config.fixed_input_size else {}
    return _called(spec, timm.create_model, name, num_classes=spec.classes, in_chans=spec.in_channels, **sized)


def _users_own(spec: NetworkSpec) -> nn.Module:
    module, _, name = spec.name.partition(":")
    how = "Write package.module:function, importable from the repository's root, that takes the number of classes"
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as problem:  # the module runs when it is imported
        raise UserError(f"network '{spec.name}' cannot be imported: {said(problem)}. {how}") from problem
    try:
        inspect.signature(function).bind(spec.classes)
    except TypeError as problem:
        raise UserError(f"network '{spec.name}' cannot be called with the number of classes alone: {problem}. "
                        f"{how}") from None
    except ValueError:
        pass  # of a builtin, the arguments are not known
    network = _called(spec, function, spec.classes)
    if not isinstance(network, nn.Module):
        raise UserError(f"network '{spec.name}' returned {type(network).__name__}; it must return a torch.nn.Module")
    return network


def _called(spec: NetworkSpec, function: Callable, *arguments, **options) -> nn.Module:
    try:
        return function(*arguments, **options)
    except Exception as problem:  # the function's own mistake, which is no mistake in calling it
        raise UserError(f"network '{spec.name}' cannot be built for {spec.classes} classes and images of "
                        f"{spec.image_size} pixels: {said(problem)}") from problem


def _with_input_channels(network: nn.Module, in_channels: int) -> nn.Module:
    """Replaces the first convolution where images do not have three channels."""
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != in_channels:
        stem = nn.Conv2d(in_channels, first.out_channels, first.kernel_size, first.stride, first.padding,
                         first.dilation, first.groups, first.bias is not None, first.padding_mode)
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

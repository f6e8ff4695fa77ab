"""The zoo: every classifier of torchvision and 25 families of timm, small images, random weights; and what must hold.

The test and the generated page docs/networks.md share it. A network is cut to about 0.6 of its MACs with random
channels, and compared with itself, with those channels closed by gates where they are consumed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hobs_rspar import networks, slicing, surgery
from hobs_rspar.allocation.space import Space, floors
from hobs_rspar.config import torchvision_classifiers
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.networks import NetworkSpec

BUDGET, TOLERANCE = 0.6, 0.1
LARGE = 2**27  # parameters; larger networks are compared in single precision
CLOSE = {torch.float64: 1e-8, torch.float32: 1e-3}  # largest difference, relative to the largest logit
# The smallest member of a family that cuts what the family stands for.
TIMM = ("resnetv2_18", "resnest14d", "res2net50_14w_8s", "skresnet18", "legacy_seresnet18", "ese_vovnet19b_slim_dw",
        "dla46_c", "dpn48b", "hrnet_w18_small", "cs3darknet_focus_s", "lcnet_035", "ghostnet_050", "eca_nfnet_l0",
        "repvgg_a0", "convmixer_768_32", "inception_next_atto", "rexnet_100", "repvit_m0_9", "edgenext_xx_small",
        "mobilevit_xxs", "poolformer_s12", "levit_128s", "vit_tiny_patch16_224", "pvt_v2_b0", "hgnetv2_b0")
# The smallest of each of torchvision's families: these are exported, too.
FAMILIES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
            "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf",
            "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1",
            "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_32")
PIXELS, SIZES = 32, {"alexnet": 64, "inception_v3": 75, "maxvit_t": 224, "vit_h_14": 28}  # the smallest that run
# A dozen of all kinds that takes a minute in all: of the slower ones, fewer of the same blocks.
DOZEN = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet", "squeezenet1_1", "zoo:small_efficientnet",
         "zoo:small_regnet", "zoo:small_densenet", "zoo:small_resnext", "zoo:small_shufflenet", "zoo:small_convnext",
         "zoo:small_transformer")


def small_efficientnet(classes: int) -> nn.Module:
    models = networks.torchvision_models()
    block = models.efficientnet.MBConvConfig
    return models.EfficientNet([block(1, 3, 1, 16, 8, 1, 1, 1), block(4, 5, 2, 8, 16, 2, 1, 1)], 0.2,
                               num_classes=classes, last_channel=64)


def small_regnet(classes: int) -> nn.Module:
    models = networks.torchvision_models()
    blocks = models.regnet.BlockParams([1, 1, 2], [16, 32, 64], [8, 8, 16], [1.0] * 3, [2] * 3, se_ratio=0.25)
    return models.RegNet(blocks, classes)


def small_densenet(classes: int) -> nn.Module:
    return networks.torchvision_models().DenseNet(8, (2, 2, 2), 16, num_classes=classes)


def small_resnext(classes: int) -> nn.Module:
    models = networks.torchvision_models()
    return models.ResNet(models.resnet.Bottleneck, [1, 2, 1, 1], classes, groups=8, width_per_group=4)


def small_shufflenet(classes: int) -> nn.Module:
    return networks.torchvision_models().ShuffleNetV2([2, 1, 1], [24, 32, 64, 128, 256], num_classes=classes)


def small_convnext(classes: int) -> nn.Module:
    models = networks.torchvision_models()
    setting = [models.convnext.CNBlockConfig(24, 48, 1), models.convnext.CNBlockConfig(48, None, 1)]
    return models.ConvNeXt(setting, num_classes=classes)


def small_transformer(classes: int) -> nn.Module:
    return networks.torchvision_models().VisionTransformer(32, 8, 2, 4, 48, 96, num_classes=classes)


def every() -> list[NetworkSpec]:
    """All networks of the zoo, torchvision's first."""
    found = [NetworkSpec(name, 10, 3, SIZES.get(name, PIXELS)) for name in torchvision_classifiers()]
    return found + [NetworkSpec(f"timm:{name}", 10, 3, 64) for name in TIMM]


def dozen() -> list[NetworkSpec]:
    return [NetworkSpec(name, 10, 3, PIXELS) for name in DOZEN]


@dataclass
class Cut:
    """A network with its groups, and the cut one.

    Attributes:
        spec: of the dense network.
    """

    spec: NetworkSpec

    @cached_property
    def dense(self) -> nn.Module:
        return signalling(networks.build(self.spec), self.images(16))

    @cached_property
    def groups(self) -> Groups:
        return surgery.groups(self.dense, self.images(1))

    @cached_property
    def widths(self) -> np.ndarray:
        """At one common ratio, at the budget or as near to it as the floors allow."""
        lowest = self.groups.macs(floors(self.groups, 0)) / self.groups.dense_macs
        return Space(self.groups, max(BUDGET, np.ceil(100 * lowest) / 100), 0, TOLERANCE).uniform

    @cached_property
    def kept(self) -> list[list[int]]:
        random = np.random.default_rng(0)
        return [sorted(random.choice(group.channels, int(width), replace=False).tolist())
                for group, width in zip(self.groups, self.widths)]

    @cached_property
    def small(self) -> nn.Module:
        return slicing.sliced(self.dense, self.groups, self.kept)

    def images(self, count: int) -> Tensor:
        """Random images [count, 3, size, size]: coarse patterns under noise, so that they differ after pooling, too."""
        random, size = torch.Generator().manual_seed(count), self.spec.image_size
        coarse = torch.randn(count, 3, 3, 3, generator=random)
        return F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * torch.randn(count, 3, size, size,
                                                                                        generator=random)


@torch.no_grad()
def signalling(network: nn.Module, x: Tensor) -> nn.Module:
    """Random values for parameters that start as constants (norms, layer scales, zero heads) and for batch statistics.

    With what they start from, whole blocks give zero, and a wrong cut would not be seen.
    """
    random = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.numel() > 1 and parameter.min() == parameter.max():
            spread = 0.3 / max(1, parameter[0].numel()) ** 0.5
            start = 0.0 if parameter.flatten()[0] == 0 else 1.0
            parameter.copy_(start + spread * torch.randn(parameter.shape, generator=random))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network.train()(x)
    return network.eval()


@torch.no_grad()
def deviation(cut: Cut) -> tuple[float, float]:
    """Largest difference of the cut network's logits from the gated one's, and from the dense one's.

    Both are relative to the largest logit; in double precision, but for large networks.
    """
    dtype = precision(cut.dense)
    x, dense, small = cut.images(3).to(dtype), copy.deepcopy(cut.dense).to(dtype), copy.deepcopy(cut.small).to(dtype)
    before, gates = dense(x), Gates(cut.groups)
    with gates.applied(dense, gates.mask(cut.kept).to(dtype)), partial_norms(dense, alive(cut)):
        return difference(small(x), dense(x)), difference(small(x), before)


def precision(network: nn.Module) -> torch.dtype:
    large = sum(parameter.numel() for parameter in network.parameters()) > LARGE
    return torch.float32 if large else torch.float64


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference of logits, relative to the largest one."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def alive(cut: Cut) -> dict[str, Tensor]:
    """Which entries of a layer norm's vectors are kept [channels]."""
    found: dict[str, Tensor] = {}
    for group, channels in zip(cut.groups, cut.kept):
        for member in group.with_role("norm"):
            layer = cut.dense.get_submodule(member.layer)
            if isinstance(layer, nn.LayerNorm):
                mask = found.setdefault(member.layer, torch.ones(layer.normalized_shape, dtype=torch.bool))
                mask[member.of(sorted(set(range(group.channels)) - set(channels)))] = False
    return found


@contextmanager
def partial_norms(network: nn.Module, alive: dict[str, Tensor]) -> Iterator[None]:
    """Layer norms take their statistics over kept channels inside the ``with`` block."""
    hooks = [network.get_submodule(name).register_forward_hook(partial(_normalised, mask))
             for name, mask in alive.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _normalised(alive: Tensor, norm: nn.LayerNorm, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What a layer norm gives for the channels ``alive``; where they are is seen by what it gave for all."""
    for dim in (-1, 1):
        x = inputs[0].movedim(dim, -1)
        if x.shape[-1] == len(alive) and torch.allclose(
                F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).movedim(-1, dim), out):
            result = torch.zeros_like(x)
            result[..., alive] = F.layer_norm(x[..., alive], (int(alive.sum()),), norm.weight[alive],
                                              None if norm.bias is None else norm.bias[alive], norm.eps)
            return result.movedim(-1, dim)
    raise AssertionError(f"{norm} normalises neither the last nor the second dimension")


def counted(network: nn.Module, x: Tensor) -> int:
    """MACs by PyTorch's own counter, with gradients on: attention then runs operation by operation."""
    network = copy.deepcopy(network)  # some keep what they computed with gradients on
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        network(x)
    return counter.get_total_flops() // 2


def stepped(network: nn.Module, x: Tensor) -> tuple[float, set[str]]:
    """One step of training of a copy.

    Returns:
        The loss after it, and the parameters that got no gradient.
    """
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    labels = torch.arange(len(x)) % 10
    F.cross_entropy(network(x), labels).backward()
    idle = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(network(x), labels).item(), idle

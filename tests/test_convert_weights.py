"""Published CIFAR ResNets, converted, against a network with option-A shortcuts written here."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.networks import BasicBlock, NetworkSpec, build

sys.path.insert(0, str(Path(__file__).parents[1] / "tasks"))
import convert_weights  # noqa: E402  (the line above makes it importable)


class OptionA(nn.Module):
    """Every other pixel, a quarter of the new channels as zeros before the old ones and a quarter after them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


@pytest.fixture
def published() -> nn.Module:
    """ResNet-8 with random weights and statistics, as such weights are published."""
    network = build(NetworkSpec("resnet8", 10, 3, 32), seed=1)
    for block in network.modules():
        if isinstance(block, BasicBlock) and not isinstance(block.shortcut, nn.Identity):
            block.shortcut = OptionA()
    random = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.running_mean, norm.bias.data):
                tensor.normal_(0, 0.3, generator=random)
            for tensor in (norm.running_var, norm.weight.data):
                tensor.uniform_(0.5, 1.5, generator=random)
    return network.eval()


def images(mean, std) -> Images:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (64, 3, 32, 32), generator=random, dtype=torch.uint8)
    return Images(pixels, torch.zeros(64, dtype=torch.long), torch.tensor(mean), torch.tensor(std))


@torch.no_grad()
def test_the_function_is_the_same(published):
    """ImageNet's mean, another standard deviation: exact everywhere, shortcuts and all."""
    ours = images((0.485, 0.456, 0.406), (0.25, 0.2, 0.3))
    theirs = images(*convert_weights.IMAGENET.tolist())
    network = convert_weights.converted(published.state_dict(), "resnet8", 10, ours)
    wanted, found = published(theirs.normalised(theirs.pixels)), network(ours.normalised(ours.pixels))
    assert torch.allclose(found, wanted, atol=1e-4) and wanted.std(0).min() > 1e-3


@torch.no_grad()
def test_another_mean_is_exact_inside(published):
    ours, theirs = images((0.5, 0.4, 0.45), (0.25, 0.2, 0.3)), images(*convert_weights.IMAGENET.tolist())
    network = convert_weights.converted(published.state_dict(), "resnet8", 10, ours)
    wanted = published.bn1(published.conv1(theirs.normalised(theirs.pixels)))
    found = network.bn1(network.conv1(ours.normalised(ours.pixels)))
    assert torch.allclose(found[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1], atol=1e-4)
    assert not torch.allclose(found, wanted, atol=1e-3)


@torch.no_grad()
def test_shortcuts_pass_on_in_training_too(published):
    """Batch norms that estimate their statistics anew, as repair and recovery do, must not normalise a shortcut."""
    ours = images((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    network = convert_weights.converted(published.state_dict(), "resnet8", 10, ours)
    x = ours.normalised(ours.pixels)
    wanted = network(x)
    for stage in (network.layer2, network.layer3):
        stage[0].shortcut[1].train()
    assert torch.allclose(network(x), wanted, atol=1e-3)


def test_weights_of_another_network_are_refused(published):
    with pytest.raises(UserError, match="the published weights does not fit the network"):
        convert_weights.converted(published.state_dict(), "resnet20", 10, images((0.5,) * 3, (0.2,) * 3))

"""Published CIFAR ResNets as this package's: ``python tasks/convert_weights.py FILE OUT``.

The usual published weights (parameters ``conv1, bn1, layer1.0.conv1, ..., linear``) have shortcuts without parameters
(He et al. 2016, option A: every other pixel, zeros for the new channels) and normalise images as ImageNet's. Both are
special cases of this package's networks: a shortcut's 1x1 convolution that copies channels, its batch norm set to undo
its own statistics, and another scale and shift in the first layer (exact but for the border, where padding now has
another colour). OUT goes into ``pretrain.source``. Needs the data stage's images, for those statistics.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from _task import run
from hobs_rspar import checkpoint, data, networks

IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean, standard deviation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the published weights, safetensors")
    parser.add_argument("out", type=Path, help="the file to write, safetensors")
    parser.add_argument("--network", default="resnet56", help="which of this package's CIFAR ResNets (resnet56)")
    parser.add_argument("--data", default="cifar10", help="data set, fetched by the data stage (cifar10)")
    options = parser.parse_args()
    state, _ = checkpoint.load_tensors(options.file)
    images = data.load(Path("data") / options.data, "calibration")
    network = converted(state, options.network, int(len(state["linear.bias"])), images)
    checkpoint.save_tensors(options.out, {name: part.contiguous() for name, part in network.state_dict().items()})
    print(f"{options.out}: {options.network} for study.network; set pretrain.source to this file")


def converted(state: dict[str, Tensor], name: str, classes: int, images: data.Images) -> nn.Module:
    """This package's network with the published weights.

    Args:
        state: published weights.
        name: of the network, as in ``study.network``.
        classes: outputs.
        images: calibration images; the function is the same for any, the batch norms of shortcuts fit these.

    Raises:
        UserError: the weights are of another network.
    """
    network = networks.build(networks.NetworkSpec(name, classes, 3, 32))
    own = {key: tensor for key, tensor in network.state_dict().items()
           if "shortcut" in key or key.endswith("num_batches_tracked")}
    checkpoint.fit(network, own | state, "the published weights")
    shortcuts = [block.shortcut for stage in (network.layer2, network.layer3) for block in stage[:1]]
    with torch.no_grad():
        _own_normalisation(network, images)
        for shortcut in shortcuts:
            _copy_channels(shortcut)
        for shortcut in shortcuts:
            _keep_statistics(network, shortcut, images)
    return network


def _own_normalisation(network: nn.Module, images: data.Images) -> None:
    """From ImageNet's normalisation to the images': x_theirs = x_ours scale + shift, per colour."""
    scale, shift = images.std / IMAGENET[1], (images.mean - IMAGENET[0]) / IMAGENET[1]
    network.bn1.running_mean -= (network.conv1.weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
    network.conv1.weight *= scale.view(1, -1, 1, 1)


def _copy_channels(shortcut: nn.Sequential) -> None:
    """Channels go to the middle of twice as many, the others are zero; the batch norm passes them on."""
    convolution, norm = shortcut
    outputs, inputs = convolution.weight.shape[:2]
    convolution.weight.zero_()
    convolution.weight[(outputs - inputs) // 2:][:inputs, :, 0, 0] = torch.eye(inputs)
    norm.running_mean.zero_(), norm.bias.zero_(), norm.weight.fill_(1)
    norm.running_var.fill_(1 - norm.eps)


def _keep_statistics(network: nn.Module, shortcut: nn.Sequential, images: data.Images) -> None:
    """The batch norm still passes on what it reads, now also in training, where statistics are its inputs' own."""
    seen: list[Tensor] = []
    handle = shortcut[0].register_forward_hook(lambda _layer, _inputs, out: seen.append(out))
    for x, _ in images.batches(256):
        network(x)
    handle.remove()
    norm, values = shortcut[1], torch.cat(seen).transpose(0, 1).flatten(1)
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(values.var(1))
    norm.bias.copy_(norm.running_mean)
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())


if __name__ == "__main__":
    run(main)

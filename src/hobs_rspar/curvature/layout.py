"""Where a layer has its channels, positions and images: told by its kind, never by the shape of what it gets."""

from __future__ import annotations

from torch import Tensor, nn

from hobs_rspar.errors import UserError

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, nn.Linear)  # layers with weights: they give channels, and read them


def channel_axis(layer: nn.Module) -> int:
    """Axis of the channels in a layer's input and output, counted from the end: the last of a linear layer."""
    return -1 - len(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else -1


def by_image(layer: nn.Module, x: Tensor, images: int) -> Tensor:
    """A layer's input or output with the images of the pass as its first axis: rows [N * k, ...] become [N, k, ...].

    Raises:
        UserError: the rows are not a multiple of the images.
    """
    if len(x) == images:
        return x
    if images < 1 or len(x) % images:
        raise UserError(f"{layer} gets {len(x)} rows for {images} images, so that its rows belong to no image; protect "
                        "its channels (and those that it reads)")
    return x.unflatten(0, (images, -1))


def per_image(layer: nn.Module, x: Tensor, images: int) -> Tensor:
    """A layer's input or output as [N, channels, positions]."""
    x = by_image(layer, x, images)
    return x.movedim(channel_axis(layer), 1).reshape(len(x), x.shape[channel_axis(layer)], -1)


class Pass:
    """How many images the forward pass has that is under way; a layer may see more rows than that.

    Attributes:
        images: of the latest pass of the network that is watched.
    """

    def __init__(self):
        self.images = 0

    def watch(self, network: nn.Module):
        """Counts the images of the network's passes until the handle that is returned is removed."""
        return network.register_forward_pre_hook(self._begin)

    def _begin(self, _network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:
            self.images = len(inputs[0])

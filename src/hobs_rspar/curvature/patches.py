"""What a layer multiplies its weight with: the patches of its input, and whether they give the layer's own output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.curvature.layout import CONVOLUTIONS, by_image, per_image

CLOSE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}  # relative errors that are rounding; 1e-3 for all other types
COMPARED = 4096  # positions at most at which a layer's output is compared


@dataclass(frozen=True)
class Geometry:
    """A convolution over two dimensions; one over one dimension has height 1.

    Attributes:
        kernel: height, width.
        stride: likewise.
        dilation: likewise.
        padding: left, right, top, bottom, as :func:`torch.nn.functional.pad` takes them.
        mode: of the padding, in that function's words.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    mode: str

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> Geometry:
        kernel, stride, dilation = (_flat(part, 1) for part in (layer.kernel_size, layer.stride, layer.dilation))
        if layer.padding == "same":  # the odd one, where there is one, is right or at the bottom
            over = [step * (size - 1) for step, size in zip(dilation, kernel)]
            top, left = (part // 2 for part in over)
            bottom, right = over[0] - top, over[1] - left
        else:
            top, left = bottom, right = (0, 0) if layer.padding == "valid" else _flat(layer.padding, 0)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        return cls(kernel, stride, dilation, (left, right, top, bottom), mode)

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding, self.mode) if any(self.padding) else x

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        left, right, top, bottom = self.padding
        whole = (size[0] + top + bottom, size[1] + left + right)
        return tuple((whole[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1 for i in range(2))

    def index(self, size: tuple[int, int], positions: Tensor) -> Tensor:
        """Flat indices [P, k*k] of the patches at some output positions in the padded input."""
        width = self.output_size(size)[1]
        where = positions.cpu()
        top, left = where // width * self.stride[0], where % width * self.stride[1]
        rows = top[:, None] + torch.arange(self.kernel[0]) * self.dilation[0]
        columns = left[:, None] + torch.arange(self.kernel[1]) * self.dilation[1]
        flat = rows[:, :, None] * (size[1] + self.padding[0] + self.padding[1]) + columns[:, None, :]
        return flat.flatten(1)


def _flat(pair: tuple[int, ...], height: int) -> tuple[int, int]:
    return pair if len(pair) == 2 else (height, *pair)


def output_size(layer: nn.Conv1d | nn.Conv2d, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a convolution's output for an input of ``size``; the height of a 1-D one is 1."""
    return Geometry.of(layer).output_size(size)


def positions_of(layer: nn.Module, x: Tensor, images: int | None = None) -> int:
    """Output positions per image of a layer for an input x."""
    if isinstance(layer, nn.Linear):
        return x.numel() // max(1, x.shape[-1] * (images or len(x)))
    return math.prod(output_size(layer, _size(layer, x))) * len(x) // (images or len(x))


def sampled_positions(layer: nn.Module, x: Tensor, count: int | None, generator,
                      images: int | None = None) -> Tensor | None:
    """Random output positions, the same for all images of a batch; None (all) where the layer has no more."""
    if count is None:
        return None
    total = positions_of(layer, x, images)
    return None if total <= count else torch.randperm(total, generator=generator)[:count].sort().values


def patches(layer: nn.Module, x: Tensor, positions: Tensor | None, images: int | None = None) -> tuple[Tensor, float]:
    """Input patches of a layer, with a constant 1 at the end.

    Args:
        layer: convolution over one or two dimensions (any stride, padding, dilation, groups), or linear.
        x: its input: [N, C, H, W] or [N, C, W]; of a linear layer [N, features], [N, ..., features].
        positions: output positions to take [P]; None takes all.
        images: of the pass, where x has more rows than images [N * k, ...]; None: as many as rows.

    Returns:
        Patches [groups, N * P, d + 1], and the factor T / P that makes their sum an estimate over all positions.
    """
    total, count = positions_of(layer, x, images), images or len(x)
    if isinstance(layer, nn.Linear):
        taken = _places(by_image(layer, x, count).reshape(count, -1, x.shape[-1]), positions, 1)[None]
    else:
        taken = _convolved(layer, x, positions, count)
    rows = taken.new_ones(*taken.shape[:-1], taken.shape[-1] + 1)
    rows[..., :-1] = taken
    return rows.flatten(1, 2), total / taken.shape[2]


def output_rows(layer: nn.Module, out: Tensor, positions: Tensor | None, images: int | None = None) -> Tensor:
    """A layer's own outputs, bias included, at some positions [N * P, outputs]: those of :func:`patches`, in order."""
    return _places(per_image(layer, out, images or len(out)), positions, 2).transpose(1, 2).flatten(0, 1)


def _places(values: Tensor, positions: Tensor | None, axis: int) -> Tensor:
    return values if positions is None else values.index_select(axis, positions.to(values.device))


def _size(layer: nn.Module, x: Tensor) -> tuple[int, int]:
    return (1, x.shape[-1]) if isinstance(layer, nn.Conv1d) else tuple(x.shape[-2:])


def _convolved(layer: nn.Conv1d | nn.Conv2d, x: Tensor, positions: Tensor | None, images: int) -> Tensor:
    """Patches of a convolution [groups, N, P, d]."""
    x = x.unsqueeze(2) if isinstance(layer, nn.Conv1d) else x
    if len(x) == images and positions is not None:
        return _at(layer, x, positions)
    geometry = Geometry.of(layer)  # where all patches are wanted, the library's own gathering is the faster one
    taken = F.unfold(geometry.padded(x), geometry.kernel, geometry.dilation, 0, geometry.stride)
    taken = taken.view(len(x), layer.groups, -1, taken.shape[-1]).permute(1, 0, 3, 2)
    return _places(taken.reshape(layer.groups, images, -1, taken.shape[-1]), positions, 2)


def _at(layer: nn.Conv2d, x: Tensor, positions: Tensor) -> Tensor:
    """Input patches at some output positions: [groups, N, P, d]."""
    geometry = Geometry.of(layer)
    index = geometry.index(tuple(x.shape[-2:]), positions).to(x.device)
    taken = geometry.padded(x).flatten(2)[:, :, index]  # [N, C, P, k*k]
    count, channels, number, area = taken.shape
    taken = taken.view(count, layer.groups, channels // layer.groups, number, area).permute(1, 0, 3, 2, 4)
    return taken.reshape(layer.groups, count, number, -1)


@torch.no_grad()
def reproduces(layer: nn.Module, x: Tensor, out: Tensor) -> str:
    """Whether a layer's output is its weight on its input's patches, plus its bias. Never raises.

    Args:
        layer: as it stands in the network.
        x: its input.
        out: what it gave.

    Returns:
        "" where it is; else the reason in words, without the layer's name.
    """
    why = _unknown(layer)
    if why:
        return why
    try:
        wanted, seen = _compared(layer, x, out)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as problem:
        return f"{_forward(layer)} ({type(problem).__name__}: {str(problem).splitlines()[0][:120]})"
    if not wanted.isfinite().all():
        return "it gives values that are not finite"
    error = (seen - wanted).norm() / wanted.norm().clamp_min(1e-12)
    return "" if float(error) <= CLOSE.get(out.dtype, 1e-3) else _forward(layer)


def _unknown(layer: nn.Module) -> str:
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        return ""
    if isinstance(layer, CONVOLUTIONS):
        return "a 3-D convolution" if isinstance(layer, nn.Conv3d) else "a transposed convolution"
    return f"a {type(layer).__name__} is neither a convolution nor a linear layer"


def _forward(layer: nn.Module) -> str:
    plain = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Linear)
    return f"its output is not that of a plain {type(layer).__name__}" if plain else \
        f"{type(layer).__name__} has a forward of its own"


def _compared(layer: nn.Module, x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output and what its patches give, at a part of the positions [rows, outputs] both."""
    positions = _spread(layer, x)
    wanted, rows = output_rows(layer, out.float(), positions), patches(layer, x.float(), positions)[0][..., :-1]
    weight = layer.weight.float().reshape(len(rows), -1, rows.shape[-1])  # [groups, outputs per group, d]
    seen = (rows @ weight.mT).transpose(0, 1).flatten(1)
    if wanted.shape != seen.shape:
        raise ValueError(f"{list(wanted.shape)} outputs, not {list(seen.shape)}")
    return wanted, seen if layer.bias is None else seen + layer.bias.float()


def _spread(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Positions all over the output, edges (where the padding is) included; None: all."""
    total = positions_of(layer, x)
    if total <= COMPARED:
        return None
    width = 1 if isinstance(layer, nn.Linear) else output_size(layer, _size(layer, x))[1]
    edge = torch.arange(min(width, COMPARED // 4))
    step = total // (COMPARED // 2) + 1
    return torch.cat([edge, total - 1 - edge, torch.arange(0, total, step)]).unique()

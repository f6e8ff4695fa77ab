"""Batch norm for training on a CPU, faster where layers are narrow: what pruned networks are made of.

PyTorch's kernel for channels_last vectorises over channels; with 8 of them, or an odd number, most of the vector is
idle, and batch norm takes a third of a training step. Here a row of pixels is folded into the channels (a view,
[N, C, H, W] -> [N, W*C, H, 1]), the library's own kernels run on the wide view, and the per-channel sums are finished
on W*C numbers. Same mathematics, same running statistics; benchmarks/batchnorm.py measures both side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

VECTOR = 16  # channels that fill a vector of the machine; multiples of it are fast as they are
LARGE = 2**18  # elements; below it, the few more calls cost more than they save


class _Wide(torch.autograd.Function):
    """Training-mode batch norm of a dense channels_last tensor [N, C, H, W]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        width, channels = x.shape[3], x.shape[1]
        wide = _wide(x)
        means, variances = (part.float().view(width, channels) for part in
                            torch.batch_norm_update_stats(wide, None, None, 0.0))
        variance, mean = torch.var_mean(means, 0, correction=0)
        variance += variances.mean(0)
        rows = torch.stack([mean, variance, weight, bias]).repeat(1, width)
        out = nn.functional.batch_norm(wide, rows[0], rows[1], rows[2], rows[3], False, 0.0, eps)
        ctx.save_for_backward(x, rows)
        ctx.eps = eps
        moments = rows[:2, :channels]
        ctx.mark_non_differentiable(moments)
        # Not as a view of it, which PyTorch lets no in-place activation change. Nothing else holds these numbers; a
        # view taken outside of this function would be allowed, but copied twice in the backward pass.
        return _narrow(out, x.shape).data, moments

    @staticmethod
    def backward(ctx, gradient: Tensor, _moments) -> tuple[Tensor, Tensor, Tensor, None]:
        x, rows = ctx.saved_tensors
        width, channels = x.shape[3], x.shape[1]
        wide_x, wide_g = _wide(x), _wide(gradient.contiguous(memory_format=torch.channels_last))
        _, *sums = torch.ops.aten.native_batch_norm_backward(wide_g, wide_x, rows[2], rows[0], rows[1], None, None,
                                                             False, ctx.eps, [False, True, True])
        d_weight, d_bias = torch.stack(sums).view(2, width, channels).sum(1)
        # dx = scale * (g - mean(g) - normalised(x) * mean(g * normalised(x))) = scale * g + slope * x + shift
        mean, variance, weight, _ = rows[:, :channels]
        positions = x.numel() // channels
        inverse = (variance + ctx.eps).rsqrt()
        scale = weight * inverse
        slope = scale * inverse * d_weight / -positions
        shift = torch.addcmul(scale * d_bias / -positions, slope, mean, value=-1)
        zero = torch.zeros_like(mean)
        wide = torch.stack([zero, zero + 1, slope, shift, scale]).repeat(1, width)
        d_x = nn.functional.batch_norm(wide_x, wide[0], wide[1], wide[2], wide[3], False, 0.0, 0.0)
        d_x.addcmul_(wide_g, wide[4].to(d_x.dtype).view(1, -1, 1, 1))
        return _narrow(d_x, x.shape), d_weight, d_bias, None


def _wide(x: Tensor) -> Tensor:
    """A view [N, W*C, H, 1] of a dense channels_last tensor [N, C, H, W]."""
    count, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).view(count, height, 1, width * channels).permute(0, 3, 1, 2)


def _narrow(wide: Tensor, shape: torch.Size) -> Tensor:
    """The inverse view of :func:`_wide`."""
    count, channels, height, width = shape
    return wide.permute(0, 2, 3, 1).reshape(count, height, width, channels).permute(0, 3, 1, 2)


def batch_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``norm(x)`` in training mode, running statistics included, by the wide view.

    Args:
        norm: with affine parameters and running statistics.
        x: [N, C, H, W], dense in channels_last.
    """
    out, (mean, variance) = _Wide.apply(x, norm.weight, norm.bias, norm.eps)
    with torch.no_grad():
        positions = x.numel() // x.shape[1]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (positions / (positions - 1)), norm.momentum)
    return out


def _pays(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    return (norm.training and x.device.type == "cpu" and x.shape[1] % VECTOR != 0 and x.numel() > LARGE
            and x.is_contiguous(memory_format=torch.channels_last))


@contextmanager
def wide_batchnorm(network: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block, the network's batch norms take the wide view where it pays."""
    norms = [module for module in network.modules()
             if type(module) is nn.BatchNorm2d and module.affine and module.momentum is not None
             and module.track_running_stats]

    def forward(norm: nn.BatchNorm2d):
        plain = norm.forward
        return lambda x: batch_norm(norm, x) if _pays(norm, x) else plain(x)

    for norm in norms:
        norm.forward = forward(norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward

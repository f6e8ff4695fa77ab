"""What each operation of PyTorch does to channels: the rules of the trace, by the name of the aten operation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hobs_rspar.structure.ends import nothing, unknown
from hobs_rspar.structure.layers import addmm, batch_norm, convolution, group_norm, layer_norm, matmul, product
from hobs_rspar.structure.meetings import elementwise, reduce, softmax, spatial
from hobs_rspar.structure.moves import copy, made, move, noise, restride

Rule = Callable[[object, Callable, tuple, dict, object], None]  # trace, operation, its arguments, what it gave
MOVES = """cat channel_shuffle clone constant_pad_nd flip gather
index index_select lift_fresh native_channel_shuffle pixel_shuffle pixel_unshuffle repeat roll rot90 stack
im2col reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
_reshape_copy _to_copy _unsafe_view select_copy slice_copy split_copy split_with_sizes_copy unbind_copy""".split()
ELEMENTWISE = "_prelu_kernel hardswish glu masked_fill where lerp addcmul addcdiv native_dropout".split()
SPATIAL = """max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool1d
adaptive_max_pool2d adaptive_max_pool3d max_unpool2d max_unpool3d fractional_max_pool2d
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
_upsample_bicubic2d_aa grid_sampler_2d""".split()
REDUCTIONS = """mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm logsumexp prod any all
median nanmedian argmax argmin cumsum cumprod""".split()
MADE = """empty new_empty empty_like zeros zeros_like new_zeros ones ones_like new_ones full full_like new_full
empty_strided new_empty_strided""".split()
NOISE = "bernoulli uniform normal exponential rand rand_like randn randn_like".split()
FILLS = "fill zero".split()  # in place


def rule_of(func) -> Rule:
    """The rule of an aten operation."""
    plain = func.overloadpacket.__name__.rstrip("_")
    if plain in RULES and func._overloadname != "other":  # max(a, b) is no reduction
        return RULES[plain]
    if func.is_view:
        return move
    return elementwise if torch.Tag.pointwise in func.tags else unknown


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES, move), **dict.fromkeys(ELEMENTWISE, elementwise), **dict.fromkeys(SPATIAL, spatial),
    **dict.fromkeys(REDUCTIONS, reduce), **dict.fromkeys(MADE, made), **dict.fromkeys(FILLS, nothing),
    **dict.fromkeys(NOISE, noise),
    **dict.fromkeys(("_softmax", "_log_softmax", "softmax", "log_softmax"), softmax),
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution"), convolution),
    **dict.fromkeys(("mm", "bmm"), matmul), "addmm": addmm, "baddbmm": addmm, "copy": copy, "as_strided": restride,
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
                     "cudnn_batch_norm", "_batch_norm_with_update"), batch_norm),
    "native_group_norm": group_norm, "native_layer_norm": layer_norm,
    **{f"_scaled_dot_product_{kind}": product for kind in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention",
        "fused_attention_overrideable")},
}

"""What a classifier gives: logits [n, classes], or one sentence that says what it gives instead, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from hobs_rspar.admission import check_example
from hobs_rspar.errors import UserError


def check_classifier(model: nn.Module, example: Tensor) -> int:
    """Runs the network and refuses outputs that are not logits.

    Args:
        model: that passed :func:`hobs_rspar.admission.check_network`; untouched.
        example: input [n, C, H, W] on the network's device.

    Returns:
        The number of classes.

    Raises:
        UserError: as :func:`hobs_rspar.admission.check_example`, or the output is something else than finite logits
            [n, classes].
    """
    out = check_example(model, example)
    fault = _not_logits(out, len(example))
    if fault:
        raise UserError(f"{type(model).__name__}: the output must be logits [n, classes]; {fault}")
    return out.shape[1]


def _not_logits(out, count: int) -> str:
    """What the output is instead of logits [n, classes], and what to do; empty if it is logits."""
    if not isinstance(out, Tensor):
        return _container(out)
    shape = list(out.shape)
    if not out.is_floating_point():
        return f"it is {str(out.dtype).removeprefix('torch.')} of shape {shape}: return the logits, not the classes"
    if out.dim() == 4 and shape[2:] == [1, 1]:
        return f"its shape is {shape}: give nn.Sequential(model, nn.Flatten())"
    if out.dim() == 1 and count == 1 and shape[0] > 1:
        return f"for one image its shape is {shape}: a squeeze() takes the batch away; use flatten(1) instead"
    if out.dim() != 2 or shape[0] != count:
        return f"for an input of {count} its shape is {shape}: give a network that classifies images, or wrap it in " \
               "one that does"
    if shape[1] < 2:
        return f"its shape is {shape}, one output: give a network of two, such as a wrapper that returns " \
               "torch.cat([torch.zeros_like(z), z], 1) of its output z"
    return _bad_values(out)


def _container(out) -> str:
    if isinstance(out, Mapping):
        keys = [str(key) for key in out]
        return f"it is a {type(out).__name__} with {', '.join(keys[:8])}: give a wrapper whose forward returns " \
               f"model(x)['{'logits' if 'logits' in keys else keys[0] if keys else 'logits'}']"
    if isinstance(out, (tuple, list)):
        return f"it is a {type(out).__name__} of {len(out)}: give a wrapper whose forward returns the one that " \
               "classifies, such as model(x)[0]"
    seen = "None" if out is None else f"a {type(out).__name__}"
    return f"it is {seen}: give a wrapper whose forward returns a tensor"


def _bad_values(out: Tensor) -> str:
    if not out.isfinite().all():
        return "it is not finite (NaN or infinity) for the first image: check the weights, and the images' scale"
    if (out >= 0).all() and ((out.sum(1) - 1).abs() < 1e-5).all():
        return "it is probabilities, which sum to 1: leave the softmax at the network's end out"
    return ""

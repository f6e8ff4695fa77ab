"""A network as files that run without this package: ONNX and torch.export, checked against PyTorch on real images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from hobs_rspar import checkpoint
from hobs_rspar.errors import UserError
from hobs_rspar.hardware.timing import Comparison, CpuClock, Schedule, example, interleave, prepared
from hobs_rspar.networks import NetworkSpec

FILES = {"onnx": "model.onnx", "torch_export": "model.pt2"}
INPUT, OUTPUT = "images", "logits"
CLOSE = 1e-3  # largest difference of logits, relative to the largest logit
CPU = torch.device("cpu")

Run = Callable[[Tensor], Tensor]


def write(network: nn.Module, spec: NetworkSpec, folder: Path) -> None:
    """Writes ``model.onnx`` and ``model.pt2`` for any number of normalised float32 images [N, C, H, W].

    Source lines, which name folders of this machine, are taken out of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = copy.deepcopy(network).to(CPU, memory_format=torch.contiguous_format).eval()
    two = example((2, *spec.example().shape[1:]), CPU).contiguous()  # one image would be taken for a fixed number
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the library's, about itself
        program = torch.export.export(plain, (two,), dynamic_shapes=({0: torch.export.Dim("N")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)
        torch.export.save(program, folder / FILES["torch_export"])
        converted = torch.onnx.export(program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False)
    for node in converted.model.graph.all_nodes():
        node.metadata_props.clear()
    converted.save(folder / FILES["onnx"])


def load(folder: Path, threads: int) -> dict[str, Run]:
    """Both files as functions from normalised images to logits, on the CPU with a number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(folder / FILES["onnx"], options, providers=["CPUExecutionProvider"])
    program = torch.export.load(folder / FILES["torch_export"]).module()
    return {"onnx": lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0]), "torch_export": program}


@torch.inference_mode()
def compared(network: nn.Module, runs: dict[str, Run], x: Tensor) -> dict[str, dict]:
    """How far the logits of each file are from the network's own, on images [N, C, H, W].

    Returns:
        Per file ``largest_difference`` (of logits, relative to the largest logit), ``same_class`` (share of images).

    Raises:
        UserError: a file computes something else.
    """
    wanted, found = prepared(copy.deepcopy(network), CPU)(x), {}
    for name, run in runs.items():
        got = run(x.contiguous())
        difference = ((got - wanted).abs().max() / wanted.abs().max()).item()
        if not difference <= CLOSE:
            raise UserError(f"{FILES[name]} does not compute what the network does: logits differ by "
                            f"{difference:.2g} of the largest one (allowed: {CLOSE:g}); do not use it")
        same = (got.argmax(1) == wanted.argmax(1)).double().mean().item()
        found[name] = {"largest_difference": difference, "same_class": same}
    return found


def latency(network: nn.Module, runs: dict[str, Run], shape: Sequence[int], batch_sizes: Sequence[int],
            seconds: float) -> dict[str, dict]:
    """ONNX Runtime against eager PyTorch on the CPU, in turn, by batch size.

    Args:
        network: the exported one.
        runs: see :func:`load`.
        shape: of one image [C, H, W].
        batch_sizes: images per call.
        seconds: of timing, for all batch sizes together.

    Returns:
        Per batch size both summaries, and PyTorch's time as a multiple of ONNX Runtime's with its interval.
    """
    eager, found = prepared(copy.deepcopy(network), CPU), {}
    for size in sorted(batch_sizes):
        x = example((size, *shape), CPU)
        plain = x.contiguous()
        calls = [lambda x=x: eager(x), lambda plain=plain: runs["onnx"](plain)]
        with torch.inference_mode():
            samples = interleave(calls, size, Schedule(seconds / len(batch_sizes)), CpuClock())
        timed = Comparison.of(*samples)
        found[str(size)] = {"pytorch": timed.dense.summary(), "onnx_runtime": timed.pruned.summary(),
                            "ratio": timed.speedup, "ratio_lo": timed.lo, "ratio_hi": timed.hi}
    return found


def sizes(folder: Path) -> dict[str, dict]:
    """Name, bytes and SHA-256 of each file."""
    return {kind: {"file": name, "bytes": (folder / name).stat().st_size, "sha256": checkpoint.digest(folder / name)}
            for kind, name in FILES.items()}

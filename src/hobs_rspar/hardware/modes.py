"""Two networks in every mode in which they could be served, each mode timed in fresh processes.

A mode is a way to run (eager, ``torch.compile``, CUDA graphs), a number format, batch norms as trained or folded into
the convolutions, and a batch size; it is always the same for both networks. A process has its own memory layout, clock
and compiled kernels, so the interval of a speedup resamples processes first, then the rounds within them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar.device import has_bf16
from hobs_rspar.folding import following_norms, fused
from hobs_rspar.hardware import timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RESAMPLES = 2000
Call = Callable[[], object]


@dataclass(frozen=True)
class Mode:
    """How both networks run."""

    run: str
    dtype: str
    batchnorm: str
    batch: int


@dataclass(frozen=True)
class Plan:
    """What one process measures.

    Attributes:
        dense: the reference, in evaluation mode, on the CPU.
        pruned: what is compared with it.
        image: shape of one image.
        modes: in this order.
        seconds: of timing for each mode, both networks together.
        threads: CPU threads.
        device: where.
    """

    dense: nn.Module
    pruned: nn.Module
    image: tuple[int, ...]
    modes: tuple[Mode, ...]
    seconds: float
    threads: int
    device: torch.device


@dataclass(frozen=True)
class Seen:
    """What one process saw of one mode: milliseconds of both networks [rounds, calls], or why nothing."""

    dense: np.ndarray
    pruned: np.ndarray
    reason: str = ""


def modes(batch_sizes: Sequence[int], compiled: Sequence[int], device: torch.device) -> tuple[Mode, ...]:
    """All modes: eager in both formats with batch norms as trained and folded; compiled; on a GPU as CUDA graphs."""
    eager = [Mode("eager", dtype, batchnorm, batch) for dtype in DTYPES for batchnorm in ("as trained", "folded")
             for batch in batch_sizes]
    graphs = [Mode("cuda graph", dtype, "folded", batch) for dtype in DTYPES for batch in batch_sizes]
    return (*eager, *(graphs if device.type == "cuda" else ()),
            *(Mode("compiled", dtype, "as trained", batch) for dtype in DTYPES for batch in compiled))


def measured(plan: Plan, processes: int) -> Iterator[list[Seen]]:
    """What each of some fresh processes saw, mode by mode."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for _ in range(processes):
            yield pool.submit(one_process, plan).result()


def one_process(plan: Plan) -> list[Seen]:
    """All modes in this process."""
    torch.set_num_threads(plan.threads)
    return [_seen(plan, mode) for mode in plan.modes]


def row(mode: Mode, seen: Sequence[Seen]) -> dict:
    """One mode over all processes: percentiles of all calls, speedup = dense time / pruned time with its interval."""
    reason = next((each.reason for each in seen if each.reason), "")
    if reason:
        return asdict(mode) | {"reason": reason}
    percentiles = {f"{name}_p{q}_ms": _rounded(np.percentile(np.concatenate([getattr(each, name).ravel()
                                                                              for each in seen]), q))
                   for name in ("dense", "pruned") for q in (50, 90, 99)}
    speedup, lo, hi = over_processes(seen)
    return asdict(mode) | percentiles | {
        "speedup": _rounded(speedup), "speedup_lo": _rounded(lo), "speedup_hi": _rounded(hi), "processes": len(seen),
        "by_process": [_rounded(np.median(each.dense) / np.median(each.pruned)) for each in seen], "reason": ""}


def over_processes(seen: Sequence[Seen], seed: int = 0) -> tuple[float, float, float]:
    """Median speedup of the processes, and its percentile interval: processes are resampled, then rounds in each."""
    random = np.random.default_rng(seed)
    rounds = [np.stack([np.median(each.dense, 1), np.median(each.pruned, 1)]) for each in seen]  # [2, rounds]
    within = np.stack([_ratios(part, random) for part in rounds])  # [processes, RESAMPLES]
    chosen = random.integers(len(seen), size=(len(seen), RESAMPLES))
    drawn = np.median(np.take_along_axis(within, chosen, 0), 0)
    whole = np.median([np.median(each.dense) / np.median(each.pruned) for each in seen])
    lo, hi = np.quantile(drawn, [(1 - timing.CONFIDENCE) / 2, (1 + timing.CONFIDENCE) / 2])
    return float(whole), float(lo), float(hi)


def folded_copy(network: nn.Module, x: Tensor) -> nn.Module:
    """A copy whose batch norms are part of the convolutions before them, where those alone are read by them.

    Args:
        network: in evaluation mode; stays as it is.
        x: one image [1, C, H, W].
    """
    network = copy.deepcopy(network)
    followers = following_norms(network, x)
    names = {norm: name for name, norm in network.named_modules()}
    for layer, norm in followers.items():
        convolution = network.get_submodule(layer)
        weight, bias = fused(convolution, norm)
        convolution.weight, convolution.bias = nn.Parameter(weight), nn.Parameter(bias)
        parent, _, name = names[norm].rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def _seen(plan: Plan, mode: Mode) -> Seen:
    """Times one mode; what the machine or the compiler cannot do is a reason, not a failure of all modes."""
    nothing = np.empty((0, 0))
    if mode.dtype == "bf16" and not has_bf16(plan.device):
        return Seen(nothing, nothing, "not measured: the device has no bf16 in hardware")
    x = timing.example((mode.batch, *plan.image), plan.device).to(DTYPES[mode.dtype])
    try:
        with torch.inference_mode():
            calls = [_call(network, x, mode) for network in (plan.dense, plan.pruned)]
            dense, pruned = timing.interleave(calls, mode.batch, timing.Schedule(plan.seconds),
                                              timing.clock_for(plan.device))
    except Exception as problem:  # of a compiler that is missing or fails: whatever it raises
        if mode.run == "eager":
            raise
        return Seen(nothing, nothing, f"not measured: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}")
    return Seen(dense.milliseconds, pruned.milliseconds)


def _call(network: nn.Module, x: Tensor, mode: Mode) -> Call:
    """What is timed: one forward pass of ``network`` in this mode."""
    made = copy.deepcopy(network)
    if mode.batchnorm == "folded":
        with torch.inference_mode(False):
            made = folded_copy(made.float().cpu(), torch.zeros(1, *x.shape[1:]))
    made = timing.prepared(made, x.device).to(x.dtype)
    if mode.run == "compiled":
        made = torch.compile(made, dynamic=False)
    return _graph(made, x) if mode.run == "cuda graph" else lambda: made(x)


def _graph(network: nn.Module, x: Tensor) -> Call:
    """The pass captured as a CUDA graph, so that launching its kernels costs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels before the capture
            network(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        network(x)
    return graph.replay


def _ratios(rounds: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Resampled ratios of the medians over rounds [2, rounds] -> [RESAMPLES]."""
    chosen = random.integers(rounds.shape[1], size=(RESAMPLES, rounds.shape[1]))
    dense, pruned = np.median(rounds[:, chosen], 2)
    return dense / pruned


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

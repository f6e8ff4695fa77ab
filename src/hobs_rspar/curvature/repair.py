"""Repair after surgery, in closed form: least-squares refit of the consumers, and batch-norm re-estimation.

No gradient steps and no labels are used. The refit makes every consumer reproduce the dense network's outputs from the
inputs that are left (as ThiNet, channel pruning and AMC do), layer by layer, on what the already repaired layers before
it really give. Where the activations of all images take too much memory at once, sums over batches of images are taken
instead, and batches wait for each other before every layer (:mod:`hobs_rspar.curvature.streamed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.observe import Observed, inputs, outputs, shrunk_consumers
from hobs_rspar.curvature.refit import refit, ridge_solution
from hobs_rspar.curvature.streamed import refit_in_step
from hobs_rspar.data import Images
from hobs_rspar.device import autocast
from hobs_rspar.errors import UserError, did_you_mean

BATCH = 256  # images a pass, where they fit
SMALLEST = 32  # of them at least: batch norms use the batch's own statistics
HELD = 2**28  # bytes that the largest input and output of a layer may take for all images of a pass
REPAIRS = ("none", "batchnorm", "least_squares")


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, images: Images, precision: str = "fp32", batch_size: int = BATCH) -> None:
    """Replaces the running statistics of all batch norms by those of ``images``; ends in evaluation mode."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
        norm.train()
    with autocast(images.pixels.device, precision):
        for x, _ in images.batches(batch_size):
            if len(x) > 1:  # a last batch of a single image has no variance
                network(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    network.eval()


def refit_weight(weight: Tensor, covariance: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Least-squares weight of a consumer that sees only some of its inputs.

    Args:
        weight: [outputs, d].
        covariance: of the inputs [d, d].
        kept: columns that are left [k].
        ridge: relative to the mean diagonal.

    Returns:
        The weight on all columns [outputs, d], zero where nothing is left.
    """
    out = torch.zeros_like(weight)
    out[:, kept] = ridge_solution(covariance[kept][:, kept], covariance[kept] @ weight.T, ridge)
    return out


def carry_out(plan, pruned: nn.Module, dense: nn.Module, groups: Groups, images: Images, options,
              generator: torch.Generator) -> None:
    """Does what ``plan.repair`` asks for; arguments as :func:`least_squares`.

    Raises:
        UserError: the plan asks for an unknown repair.
    """
    if plan.repair not in REPAIRS:
        raise UserError(f"plan of {plan.method}: repair '{plan.repair}' is not known."
                        f"{did_you_mean(plan.repair, REPAIRS)} Allowed: {', '.join(REPAIRS)}")
    if plan.repair == "least_squares":
        least_squares(pruned, dense, groups, plan.kept, images, options, generator)
    elif plan.repair == "batchnorm":
        reestimate_batchnorm(pruned, images)


def least_squares(pruned: nn.Module, dense: nn.Module, groups: Groups, kept: list[list[int]], images: Images,
                  options, generator: torch.Generator) -> float:
    """Refits all consumers of shrunken groups in order of execution, then re-estimates batch norms.

    Args:
        pruned: after surgery; changed in place.
        dense: the network before.
        groups: of the dense network.
        kept: kept channels of every group.
        images: calibration images; inputs of the refit.
        options: ``params.prune`` (positions, ridge).
        generator: draws the spatial positions.

    Returns:
        Mean relative squared output error of the refitted consumers on the same images.
    """
    layers = shrunk_consumers(dense, groups, kept, images, options.positions, generator)
    size = batch_size(layers.frontier)
    estimated = False
    if len(images) * layers.frontier <= HELD:
        errors = _at_once(pruned, dense, layers, images, options.ridge)
    else:
        errors, estimated = refit_in_step(pruned, dense, layers, list(_batches(images, size)), options.ridge)
    if not estimated:
        reestimate_batchnorm(pruned, images, batch_size=size)
    return sum(errors) / max(1, len(errors))


def batch_size(frontier: int) -> int:
    """Images a forward pass, of which each takes ``frontier`` bytes where it takes most."""
    return max(SMALLEST, min(BATCH, HELD // frontier))


def _at_once(pruned: nn.Module, dense: nn.Module, layers: Observed, images: Images, ridge: float) -> list[float]:
    """One pass of all images, in which every layer is refitted just before it runs; relative errors of the layers."""
    parts = [outputs(dense, layers, x) for x, _ in images.batches(BATCH)]
    targets = {name: torch.cat([part[name] for part in parts]) for name in layers.names}
    errors = []

    def see(name: str, layer: nn.Module, rows: Tensor) -> None:
        errors.append(refit(layer, rows.cpu(), _left(layers, name, targets.pop(name)).cpu(), ridge))

    with _batch_statistics(pruned):
        inputs(pruned, layers, images.normalised(images.pixels), see)
    return errors


def _batches(images: Images, size: int) -> Iterator[Images]:
    """Images in batches; the rest joins the last one, whose statistics would be poor without it."""
    count = max(1, len(images) // size)
    edges = [len(images) * i // count for i in range(count + 1)]
    return (replace(images, pixels=images.pixels[a:b], labels=images.labels[a:b]) for a, b in zip(edges, edges[1:]))


def _left(layers: Observed, name: str, target: Tensor) -> Tensor:
    """Of a dense layer's outputs those that the pruned one has."""
    return target if name not in layers.left else target[:, layers.left[name].to(target.device)]


@contextmanager
def _batch_statistics(network: nn.Module) -> Iterator[None]:
    """Inside the block batch norms use the images' own statistics, and keep those that they have."""
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    kept = [(norm, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, flag in kept:
            norm.track_running_stats = flag
        network.eval()


def reconstruction_error(pruned: nn.Module, dense: nn.Module, groups: Groups, kept: list[list[int]], images: Images,
                         positions: int, generator: torch.Generator) -> float:
    """Mean relative squared error of the consumers' outputs against the dense network's, on given images.

    Means are taken out of both, as the batch norm that follows does.
    """
    layers = shrunk_consumers(dense, groups, kept, images, positions, generator)
    sums: dict[str, list[Tensor]] = {}
    for batch in _batches(images, batch_size(layers.frontier)) if layers.names else ():
        x = batch.normalised(batch.pixels)
        wanted, got = outputs(dense, layers, x), outputs(pruned, layers, x)
        for name in layers.names:
            target = _left(layers, name, wanted[name]).double()
            off = got[name] - target
            found = [target.sum(0), target.square().sum(), off.sum(0), off.square().sum(), torch.tensor(len(off))]
            sums[name] = [a + b for a, b in zip(sums[name], found)] if name in sums else found
    return sum(_relative(*found) for found in sums.values()) / max(1, len(sums))


def _relative(target: Tensor, energy: Tensor, off: Tensor, square: Tensor, count: Tensor) -> float:
    """Energy of a difference, its mean taken out, relative to that of the target, from sums over rows."""
    return float((square - off.square().sum() / count) / (energy - target.square().sum() / count).clamp_min(1e-12))

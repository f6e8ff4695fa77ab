"""Repair after surgery, in closed form: least-squares refit of the consumers, and batch-norm re-estimation.

No gradient steps and no labels are used. The refit makes every consumer reproduce the dense network's outputs from the
inputs that are left (as ThiNet, channel pruning and AMC do), layer by layer, on what the already repaired layers before
it really give.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.kfac import damped, patches, sampled_positions
from hobs_rspar.data import Images
from hobs_rspar.device import autocast
from hobs_rspar.errors import UserError, did_you_mean

BATCH = 256  # images a pass
REPAIRS = ("none", "batchnorm", "least_squares")


@torch.no_grad()
def reestimate_batchnorm(network: nn.Module, images: Images, precision: str = "fp32", batch_size: int = 256) -> None:
    """Replaces the running statistics of all batch norms by those of ``images``; ends in evaluation mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
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
    some = damped(covariance[kept][:, kept], ridge)
    out = torch.zeros_like(weight)
    out[:, kept] = torch.linalg.solve(some, covariance[kept] @ weight.T).T
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
    names, rows = _consumers(groups, kept), _output_rows(groups, kept)
    where = _positions(dense, names, images, options.positions, generator)
    targets = {name: target if name not in rows else target[:, torch.tensor(rows[name])]
               for name, target in _outputs(dense, names, where, images).items()}
    errors = _refit_on_the_way(pruned, targets, where, images, options.ridge)
    reestimate_batchnorm(pruned, images)
    return sum(errors) / max(1, len(errors))


def reconstruction_error(pruned: nn.Module, dense: nn.Module, groups: Groups, kept: list[list[int]], images: Images,
                         positions: int, generator: torch.Generator) -> float:
    """Mean relative squared error of the consumers' outputs against the dense network's, on given images.

    Means are taken out of both, as the batch norm that follows does.
    """
    names, rows = _consumers(groups, kept), _output_rows(groups, kept)
    if not names:
        return 0.0
    where = _positions(dense, names, images, positions, generator)
    wanted, got = _outputs(dense, names, where, images), _outputs(pruned, names, where, images)
    errors = []
    for name in names:
        target = wanted[name] if name not in rows else wanted[name][:, torch.tensor(rows[name])]
        target, seen = target - target.mean(0), got[name] - got[name].mean(0)
        errors.append(((seen - target).square().sum() / target.square().sum().clamp_min(1e-12)).item())
    return sum(errors) / len(errors)


def _consumers(groups: Groups, kept: list[list[int]]) -> list[str]:
    """Consumers of groups that lost channels, in order of execution."""
    shrunk = {member.layer for group, channels in zip(groups, kept) if len(channels) < group.channels
              for member in group.with_role("consumer")}
    return [name for name in groups.layers if name in shrunk]


def _output_rows(groups: Groups, kept: list[list[int]]) -> dict[str, list[int]]:
    """Outputs that a layer still has, where it lost some."""
    return {member.layer: member.of(channels) for group, channels in zip(groups, kept)
            if len(channels) < group.channels for member in group.with_role("producer")}


@torch.no_grad()
def _positions(network: nn.Module, names: list[str], images: Images, count: int, generator) -> dict[str, Tensor | None]:
    """The same random output positions of every layer for all networks compared."""
    found: dict[str, Tensor | None] = {}

    def hook(name: str):
        def choose(layer: nn.Module, inputs: tuple[Tensor, ...], _out) -> None:
            found[name] = sampled_positions(layer, inputs[0], count, generator)
        return choose

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    network(images.normalised(images.pixels[:1]))
    for handle in hooks:
        handle.remove()
    return found


@torch.no_grad()
def _outputs(network: nn.Module, names: list[str], where: dict, images: Images) -> dict[str, Tensor]:
    """Outputs without bias of layers at given positions [N * positions, outputs], batch norms as they are."""
    parts: dict[str, list[Tensor]] = {name: [] for name in names}

    def hook(name: str):
        def keep(layer: nn.Module, _inputs, out: Tensor) -> None:
            bias = 0 if layer.bias is None else layer.bias.view(1, -1, *[1] * (out.dim() - 2))
            flat = (out - bias).flatten(2) if out.dim() == 4 else (out - bias)[:, :, None]
            flat = flat if where[name] is None else flat[:, :, where[name]]
            parts[name].append(flat.transpose(1, 2).reshape(-1, flat.shape[1]).cpu())
        return keep

    hooks = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for x, _ in images.batches(BATCH):
        network(x)
    for handle in hooks:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in parts.items()}


@torch.no_grad()
def _refit_on_the_way(network: nn.Module, targets: dict[str, Tensor], where: dict, images: Images,
                      ridge: float) -> list[float]:
    """One pass of all images at once, in which every layer of ``targets`` is refitted just before it runs.

    So each sees what the repaired layers before it really give; batch norms use the images' own statistics. Relative
    errors of the layers.
    """
    errors = []

    def hook(name: str):
        def refit(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = patches(layer, inputs[0], where[name])[0][0].cpu()
            errors.append(_refit(layer, rows, targets.pop(name), ridge))
        return refit

    hooks = [network.get_submodule(name).register_forward_pre_hook(hook(name)) for name in targets]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(norm, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    network(images.normalised(images.pixels))
    for handle in hooks:
        handle.remove()
    for norm, flag in kept:
        norm.track_running_stats = flag
    network.eval()
    return errors


@torch.no_grad()
def _refit(layer: nn.Module, rows: Tensor, target: Tensor, ridge: float) -> float:
    """Solves for the weight (and the bias, if there is one) that gives ``target`` from ``rows``; relative error."""
    x = rows[:, :-1]
    centre, level = x.mean(0), target.mean(0)
    x, y = x - centre, target - level  # products in float32, once the means are out; the solution in double
    gram = damped((x.T @ x).double(), ridge)
    weight = torch.linalg.solve(gram, (x.T @ y).double()).T.float()
    if layer.bias is not None:
        layer.bias += (level - weight @ centre).to(layer.bias)
    layer.weight.copy_(weight.view_as(layer.weight))
    return ((x @ weight.T - y).square().sum() / y.square().sum().clamp_min(1e-12)).item()

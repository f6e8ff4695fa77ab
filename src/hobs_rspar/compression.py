"""The one call that a user remembers: ``compress(model, loader, macs=0.5)``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hobs_rspar import cost, surgery
from hobs_rspar.allocation.space import Space
from hobs_rspar.curvature import repair, statistics
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.loaders import from_loader
from hobs_rspar.methods import _registry
from hobs_rspar.methods._protocol import Context
from hobs_rspar.networks import NetworkSpec
from hobs_rspar.plan import PruningPlan
from hobs_rspar.seeds import generator
from hobs_rspar.training import accuracy, logits

CALIBRATION = 1024  # images for sensitivity and repair; the rest, up to as many as the loader has, is for validation
MIN_RATIO = 0.1


@dataclass(frozen=True)
class SensitivityOptions:
    """The defaults of ``params.sensitivity``."""

    batch_size: int = 128
    positions: int = 49
    damping: float = 1e-3


@dataclass(frozen=True)
class RepairOptions:
    """The defaults of ``params.prune``."""

    positions: int = 49
    ridge: float = 1e-3


@dataclass(frozen=True)
class MemoryInputs:
    """A method's inputs, already in memory."""

    parts: dict[str, dict[str, Tensor]]
    splits: dict[str, Images]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.parts[name]

    def images(self, split: str) -> Images:
        return self.splits[split]


def compress(model: nn.Module, loader, macs: float = 0.5, *, protect: Sequence[str] = (),
             method: str = "hobs_rspar", seed: int = 0, **options) -> tuple[nn.Module, PruningPlan, dict]:
    """Prunes a trained classifier and repairs it; only methods that train by design do train, for a short while.

    Args:
        model: any traceable CNN classifier in PyTorch; untouched.
        loader: yields (images as the model wants them [n, C, H, W], labels [n]); 2,000 images or more are a good
            number: up to 1,024 are used for sensitivity and repair, the others to choose widths, or to train.
        macs: fraction of the multiply-accumulates to keep, in (0, 1].
        protect: names of layers whose channels all stay.
        method: a name of ``hobs_rspar/methods``.
        seed: of everything random.
        **options: of the method, as in its block of params.yaml.

    Returns:
        The smaller model in evaluation mode (recover it with a few epochs of your own training), the plan, and a
        report: ``macs``, ``params`` (before, after), ``top1_validation`` (percent: ``dense``, ``pruned`` before repair,
        ``repaired``), ``images``, ``search``.

    Raises:
        UserError: the budget is out of range or cannot be met, the model cannot be traced, the loader is empty.
    """
    if not 0 < macs <= 1:
        raise UserError(f"macs is the fraction of multiply-accumulates to keep and must be within (0, 1]; seen: {macs}")
    device = next(model.parameters()).device
    images, _ = from_loader(loader)
    images = images.to(device)
    count = min(CALIBRATION, len(images) // 2)
    if count < 1:
        raise UserError(f"the loader has {len(images)} images; at least 2 are needed, 2,000 are a good number")
    calibration, validation = images.first(count), _after(images, count)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        context = _context(model, calibration, validation, macs, protect, (method, seed))
        plan = _registry.method(method).plan(context, _registry.options(method, options))
        pruned, report = _carry_out(model, plan, context, calibration, validation)
    finally:
        for module in training:  # one by one: a frozen batch norm stays frozen
            module.training = True
    return pruned, plan, report


def _after(images: Images, count: int) -> Images:
    return replace(images, pixels=images.pixels[count:], labels=images.labels[count:])


def _context(model: nn.Module, calibration: Images, validation: Images, macs: float, protect: Sequence[str],
             cell: tuple[str, int]) -> Context:
    example = calibration.normalised(calibration.pixels[:1])
    groups = surgery.groups(model, example, protect)
    with torch.no_grad():
        classes = model(example).shape[-1]
    spec = NetworkSpec(type(model).__name__, classes, *example.shape[1:3])
    gates, factors = statistics.collect(model, groups, calibration, SensitivityOptions(),
                                        generator(cell[1], "sensitivity"))
    inputs = MemoryInputs({"gates": gates, "factors": factors},
                          {"calibration": calibration, "validation": validation, "train": validation})
    return Context(model, spec, Space(groups, macs, MIN_RATIO), *cell, "yours", {"macs": macs}, inputs)


def _carry_out(model: nn.Module, plan: PruningPlan, context: Context, calibration: Images,
               validation: Images) -> tuple[nn.Module, dict]:
    """Surgery, repair, and the report."""
    example = calibration.normalised(calibration.pixels[:1])
    if plan.weights is not None:
        model = copy.deepcopy(model)
        model.load_state_dict(plan.weights)
    pruned = surgery.remove(model, example, plan)
    top1 = {"dense": accuracy(logits(model, validation), validation.labels),
            "pruned": accuracy(logits(pruned, validation), validation.labels)}
    repair.carry_out(plan, pruned, model, context.groups, calibration, RepairOptions(),
                     generator(context.seed, "prune", context.method))
    top1["repaired"] = accuracy(logits(pruned, validation), validation.labels)
    before, after = cost.count(model, example), cost.count(pruned, example)
    return pruned, {"macs": (before.macs, after.macs), "params": (before.params, after.params),
                    "macs_ratio": after.macs / before.macs, "top1_validation": top1,
                    "images": {"calibration": len(calibration), "validation": len(validation)}, "search": plan.search}

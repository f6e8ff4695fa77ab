"""The one call that a user remembers: ``compress(model, loader, macs=0.5)``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from hobs_rspar import admission, cost, loaders, slicing, surgery
from hobs_rspar.allocation.space import Space
from hobs_rspar.batches import check_range
from hobs_rspar.classifier import check_classifier
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import repair, statistics
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError
from hobs_rspar.memory import BATCH, batch_size
from hobs_rspar.methods import _registry
from hobs_rspar.methods._protocol import Context
from hobs_rspar.networks import NetworkSpec
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import Phases, bar, showing
from hobs_rspar.protection import protected
from hobs_rspar.seeds import generator
from hobs_rspar.structure.copies import check_copies
from hobs_rspar.training import accuracy, logits

SAMPLE = 2048  # images taken from the loader
CALIBRATION = 1024  # of them for sensitivity and repair, but no more than half; the others are for validation
MIN_RATIO = 0.1
PHASES = ("images", "trace", "sensitivity", "elimination", "search", "repair")
GATES = ("true_rows", "sampled_rows", "l1", "taylor", "fisher", "signed", "kron_obd")  # of a sweep with gates alone
ELIMINATIONS = ("hobs", "relative")  # of factors alone


@dataclass(frozen=True)
class SensitivityOptions:
    """The defaults of ``params.sensitivity``."""

    batch_size: int = BATCH
    positions: int = 49
    damping: float = 1e-3


@dataclass(frozen=True)
class RepairOptions:
    """The defaults of ``params.prune``."""

    positions: int = 49
    ridge: float = 1e-3


@dataclass(frozen=True)
class MemoryInputs:
    """A method's inputs in memory; a part may be a function, which is called when a method asks for the part."""

    parts: dict[str, Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]]
    splits: dict[str, Images]

    def tensors(self, name: str) -> Mapping[str, Tensor]:
        part = self.parts[name]
        return part() if callable(part) else part

    def images(self, split: str) -> Images:
        return self.splits[split]


class OnDemand(Mapping):
    """Tensors by name, each computed with its kin when the first of them is asked for.

    Args:
        sources: name -> what computes the tensors of that name and others, by name.
    """

    def __init__(self, sources: Mapping[str, Callable[[], Mapping[str, Tensor]]]):
        self._sources = sources

    def __getitem__(self, name: str) -> Tensor:
        return self._sources[name]()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


@dataclass(frozen=True)
class Job:
    """What one call works on.

    Attributes:
        model: the dense network, in evaluation mode.
        space: its groups, and widths that meet the budget.
        calibration: images for sensitivity and repair.
        validation: the others.
        classes: of the network.
        batch: images a pass with gradients.
        phases: of the call.
    """

    model: nn.Module
    space: Space
    calibration: Images
    validation: Images
    classes: int
    batch: int
    phases: Phases

    @property
    def groups(self) -> Groups:
        return self.space.groups

    @property
    def example(self) -> Tensor:
        return self.calibration.normalised(self.calibration.pixels[:1])

    def top1(self, network: nn.Module) -> float:
        """Accuracy on the validation images in percent."""
        return accuracy(logits(network, self.validation, batch_size=min(500, 4 * self.batch)), self.validation.labels)


def compress(model: nn.Module, loader, macs: float = 0.5, *, protect=(), method: str = "hobs_rspar", seed: int = 0,
             sample: int = SAMPLE, progress: bool = True, **options) -> tuple[nn.Module, PruningPlan, dict]:
    """Prunes a trained classifier and repairs it; only methods that train by design do train, for a short while.

    Args:
        model: any traceable CNN classifier in PyTorch, of float32 parameters on one device; untouched.
        loader: yields (images as the model wants them [n, C, H, W], labels [n]), or mappings with an image and a label.
        macs: fraction of the multiply-accumulates to keep, in (0, 1].
        protect: layers whose channels all stay: names or modules, one or several; a block stands for its layers.
        method: a name of ``hobs_rspar/methods``.
        seed: of everything random.
        sample: images to take from the loader, at random: half of them and up to 1,024 for sensitivity and repair, the
            others to choose widths, or to train.
        progress: a bar with the phase and the time left, where there is a terminal.
        **options: of the method, as in its block of params.yaml.

    Returns:
        The smaller model in evaluation mode (recover it with a few epochs of your own training), the plan, and a
        report: ``macs``, ``params`` (before, after), ``macs_ratio``, ``top1_validation`` (percent: ``dense``,
        ``pruned`` before repair, ``repaired``), ``images``, ``search``, ``left_alone`` (layers that were neither scored
        nor refitted by their weights -> why), and by phase ``seconds`` and ``peak_memory`` (bytes, of the process up to
        its end).

    Raises:
        UserError: an argument is out of range, the budget cannot be met, the model cannot be pruned or run, the loader
            yields something else. Nothing expensive has happened by then, but for the loading of images.
    """
    _check_arguments(macs, sample, seed, method)
    chosen, settings = _registry.method(method), _registry.options(method, options, "option ")
    admission.check_network(model)
    names = protected(model, protect)
    with showing(progress), Phases("compress", PHASES).run() as phases, cost.evaluation(model):
        job = _job(model, loader, (names, macs), (sample, seed), phases)
        with phases.phase("search"):
            plan = chosen.plan(_context(job, method, seed), settings)
        with phases.phase("repair"):
            pruned, report = _carry_out(job, plan)
    return pruned, plan, report | {"seconds": phases.seconds, "peak_memory": phases.peak_memory}


def _check_arguments(macs, sample, seed, method) -> None:
    if not isinstance(macs, Real) or not 0 < macs <= 1:
        raise UserError("macs is the fraction of multiply-accumulates to keep and must be within (0, 1]; seen: "
                        f"{macs!r}")
    if not isinstance(sample, Integral) or sample < 2:
        raise UserError(f"sample is the number of images to take from the loader, 2 or more; seen: {sample!r}")
    if not isinstance(seed, Integral):
        raise UserError(f"seed must be a whole number; seen: {seed!r}")
    if not isinstance(method, str):
        raise UserError(f"method is the name of one, such as 'hobs_rspar'; seen: {method!r}")


def _job(model: nn.Module, loader, asked: tuple[list[str], float], draw: tuple[int, int], phases: Phases) -> Job:
    """Takes images, and refuses what cannot be pruned, or not to the budget.

    Args:
        model: in evaluation mode.
        loader: of the user.
        asked: names of layers to protect, and the fraction of MACs to keep.
        draw: images to take, and the seed.
        phases: of the call.
    """
    with phases.phase("images"):
        images = loaders.sample(loader, *draw).to(next(model.parameters()).device)
    with phases.phase("trace"):
        calibration, validation = _parts(images)
        example = calibration.normalised(calibration.pixels[:1])
        classes = check_classifier(model, example)
        check_copies(model, example)  # of the user's own network: what is copied of a copy is the copy's
        check_range(images.labels, classes)
        _warn_of_few_classes(images.labels, classes)
        model, layout = _laid_out(model, example)
        calibration, validation = (replace(part, layout=layout) for part in (calibration, validation))
        example = calibration.normalised(calibration.pixels[:1])
        groups = surgery.groups(model, example, asked[0])
        statistics.refuse_nothing(model, groups)
        space = Space(groups, asked[1], MIN_RATIO)
        _ = space.uniform  # refuses a budget that cannot be met, before anything expensive
        return Job(model, space, calibration, validation, classes, batch_size(model, example), phases)


def _parts(images: Images) -> tuple[Images, Images]:
    """Calibration and validation images."""
    count = min(CALIBRATION, len(images) // 2)
    if count < 1:
        raise UserError(f"the loader has {len(images)} images; at least 2 are needed, 2,000 are a good number")
    rest = replace(images, pixels=images.pixels[count:], labels=images.labels[count:])
    return images.first(count), rest


def _laid_out(model: nn.Module, example: Tensor) -> tuple[nn.Module, torch.memory_format]:
    """A copy in channels_last, which takes half the time, where the network runs in it; else the model as it is."""
    with torch.no_grad():
        wanted = model(example.clone())
        try:
            twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
            found = twin(example.clone(memory_format=torch.channels_last))
        except RuntimeError:  # tensors of five dimensions, or a forward that takes a view of what is contiguous
            return model, torch.contiguous_format
    same = torch.allclose(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    return (twin, torch.channels_last) if same else (model, torch.contiguous_format)


def _warn_of_few_classes(labels: Tensor, classes: int) -> None:
    seen = len(labels.unique())
    if seen < min(classes, len(labels)) / 2:
        warnings.warn(f"the {len(labels)} images that were taken from the loader show {seen} of the network's "
                      f"{classes} classes, which scores and accuracies are about; shuffle the loader, or give a larger "
                      "sample", stacklevel=4)


def _context(job: Job, method: str, seed: int) -> Context:
    spec = NetworkSpec(type(job.model).__name__, job.classes, *job.example.shape[1:3])
    splits = {"calibration": job.calibration, "validation": job.validation, "train": job.validation}
    inputs = MemoryInputs(_statistics(job, seed), splits)
    return Context(job.model, spec, job.space, method, seed, "yours", {"macs": job.space.budget}, inputs)


def _statistics(job: Job, seed: int) -> dict[str, OnDemand | Callable[[], Mapping[str, Tensor]]]:
    """Gate statistics, factors and eliminations, none of which is computed before a method asks for it."""
    options = SensitivityOptions(batch_size=job.batch)

    def swept(collect: Callable, what) -> Callable[[], Mapping[str, Tensor]]:
        def compute():
            with job.phases.phase("sensitivity"):
                return collect(job.model, what, job.calibration, options, generator(seed, "sensitivity"),
                               partial(bar, name="sensitivity"))
        return cache(compute)

    def fallback() -> list[Tensor]:
        return list(gates()["fisher"].split(job.groups.sizes.tolist()))

    @cache
    def eliminated() -> Mapping[str, Tensor]:
        found = factors()
        with job.phases.phase("elimination"):
            return statistics.eliminations(job.model, job.groups, found, options.damping, fallback)

    layers = statistics.consumer_layers(job.groups)
    gates, factors = swept(statistics.gate_statistics, job.groups), swept(statistics.factors, layers)
    whole = swept(lambda *arguments: statistics.collect(*arguments)[0], job.groups)
    named = {**dict.fromkeys(statistics.SCORES, whole), **dict.fromkeys(GATES, gates),
             **dict.fromkeys(ELIMINATIONS, eliminated)}
    return {"gates": OnDemand(named), "factors": factors}


def _carry_out(job: Job, plan: PruningPlan) -> tuple[nn.Module, dict]:
    """Surgery, repair, and the report."""
    dense, seed = job.model, generator(plan.seed, "prune", plan.method)
    top1 = {"dense": job.top1(dense)}
    if plan.weights is not None:
        dense = copy.deepcopy(dense)
        dense.load_state_dict(plan.weights)
    pruned = slicing.remove(dense, job.groups, plan)
    top1["pruned"] = job.top1(pruned)
    repair.carry_out(plan, pruned, dense, job.groups, job.calibration, RepairOptions(), seed)
    top1["repaired"] = top1["pruned"] if plan.repair == "none" else job.top1(pruned)
    pruned.to(memory_format=torch.contiguous_format)
    before, after = cost.count(job.model, job.example), cost.count(pruned, job.example)
    return pruned, {"macs": (before.macs, after.macs), "params": (before.params, after.params),
                    "macs_ratio": after.macs / before.macs, "top1_validation": top1, "search": plan.search,
                    "images": {"calibration": len(job.calibration), "validation": len(job.validation)},
                    "left_alone": dict(job.groups.opaque)}

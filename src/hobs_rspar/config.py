"""params.yaml as validated objects: an unknown key, a wrong type or a value out of range is one clear message.

Imports no torch. Method blocks are checked against the ``Options`` class of the method's file by reading its source,
so that loading params imports no method.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hobs_rspar.errors import UserError, did_you_mean

METHODS = Path(__file__).parent / "methods"
DATASETS = ("fashion_mnist", "cifar10", "cifar100", "image_folder")
OWN_NETWORKS = ("resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "vgg16_bn_cifar")  # for small images


def torchvision_classifiers() -> tuple[str, ...]:
    """Names of torchvision's classifiers, read from its source: importing it would load torch; () where it is not."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return ()
    pattern = re.compile(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)\(", re.MULTILINE)
    files = (Path(found.origin).parent / "models").glob("*.py")
    return tuple(sorted(name for file in files for name in pattern.findall(file.read_text(encoding="utf-8"))))


NETWORKS = OWN_NETWORKS + torchvision_classifiers()
NETWORKS_ALLOWED = (f"{', '.join(OWN_NETWORKS)}, every classifier of torchvision (resnet18, mobilenet_v2, ...), "
                    "timm:NAME for one of timm's, or package.module:function for a network of your own")
CLAIMS = ("sensitivity", "reconstruction", "penalty", "allocators")  # scripts of benchmarks/
EXPERIMENTS = ("predictors", "rounding", "peers", "masked")  # others there, which recover networks

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Precision = Literal["auto", "bf16", "fp32"]


class Section(BaseModel):
    """A section of params.yaml: frozen, and every key must be known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Budget(Section):
    macs: Fraction | None = None
    latency_ms: Annotated[float, Field(gt=0)] | None = None
    latency_ratio: Fraction | None = None

    @model_validator(mode="after")
    def exactly_one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            seen = ", ".join(given) if given else "none"
            raise ValueError(f"exactly one of macs, latency_ms, latency_ratio must be set (set: {seen}); "
                             "write null for the others")
        return self


class Study(Section):
    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    dataset: str
    network: str
    methods: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[Count], Field(min_length=1)]
    budget: Budget
    margin_points: Annotated[float, Field(gt=0)]
    claims: list[str]
    experiments: list[str]


class Data(Section):
    folder: str | None
    validation: Positive
    calibration: Positive
    train_images: Positive | None
    test_images: Positive | None
    image_size: Positive | None
    split_seed: Count


class Training(Section):
    """The recipe of pretraining and of recovery."""

    epochs: Positive
    images: Positive | None
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Share
    weight_decay: Annotated[float, Field(ge=0)]
    warmup: Share
    crops: list[Positive]
    flip: bool
    precision: Precision
    threads: Positive

    @model_validator(mode="after")
    def a_crop_per_epoch(self) -> Training:
        if self.crops and len(self.crops) != self.epochs:
            raise ValueError(f"crops must name one size per epoch ({self.epochs}) or be empty; it names "
                             f"{len(self.crops)}")
        return self


class Pretrain(Training):
    source: str
    seed: Count


class Distillation(Section):
    weight: Share
    temperature: Annotated[float, Field(gt=0)]


class Finetune(Training):
    curve: list[Positive]
    distillation: Distillation

    @model_validator(mode="after")
    def a_growing_curve(self) -> Finetune:
        if any(first >= second for first, second in zip(self.curve, self.curve[1:])):
            raise ValueError(f"curve must name ever larger numbers of images; it names {self.curve}")
        if self.curve and self.curve[0] < self.batch_size:
            raise ValueError(f"curve begins with {self.curve[0]} images, less than a batch ({self.batch_size})")
        return self


class Sensitivity(Section):
    images: Positive
    batch_size: Positive
    positions: Positive
    damping: Annotated[float, Field(gt=0)]
    seed: Count
    threads: Positive


class Latency(Section):
    batch_size: Positive
    rounds: Positive


class Allocation(Section):
    min_ratio: Fraction
    tolerance: Annotated[float, Field(gt=0, le=0.05)]
    round_to: Positive
    threads: Positive


class Prune(Section):
    images: Positive
    precision: Precision
    positions: Positive
    ridge: Annotated[float, Field(gt=0)]
    threads: Positive


class Benchmark(Section):
    platform: str | None
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    seconds: Annotated[float, Field(gt=0)]
    threads: Positive


class Speed(Section):
    cells: list[str]
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    compiled: list[Positive]
    seconds: Annotated[float, Field(gt=0)]
    processes: Positive


class Export(Section):
    cells: list[str]


class Report(Section):
    confidence: Annotated[float, Field(gt=0, lt=1)]
    resamples: Positive
    seed: Count


class Params(Section):
    """Everything that params.yaml says."""

    study: Study
    device: Literal["auto", "cpu", "cuda"]
    data: Data
    pretrain: Pretrain
    sensitivity: Sensitivity
    latency: Latency
    allocation: Allocation
    methods: dict[str, dict[str, Any]]
    prune: Prune
    finetune: Finetune
    benchmark: Benchmark
    speed: Speed
    export: Export
    report: Report

    @property
    def cells(self) -> list[str]:
        return [f"{method}-{seed}" for method in self.study.methods for seed in self.study.seeds]


def load(path: str | Path = "params.yaml") -> Params:
    """Reads and validates a params file.

    Raises:
        UserError: the file is missing or no YAML; a key is unknown, missing, of the wrong type or out of range.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found; run from the repository's root, or 'make study STUDY=default'") from None
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {problem}") from None
    try:
        params = Params.model_validate(raw)
    except ValidationError as problem:
        raise UserError(_message(path, problem)) from None
    _check_names(path, params)
    return params


def available_methods() -> list[str]:
    """Names of the methods: the files of ``hobs_rspar/methods`` that do not begin with an underscore."""
    return sorted(file.stem for file in METHODS.glob("[!_]*.py"))


def method_options(method: str, name: str = "Options") -> set[str]:
    """Option names of a method, read without importing it.

    They are those of the class in its file, or that it imports, and of those which that extends.
    """
    for node in ast.parse((METHODS / f"{method}.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            own = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
            return own.union(*(method_options(method, base.id) for base in node.bases))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("hobs_rspar.methods."):
            for item in node.names:
                if name == (item.asname or item.name):
                    return method_options(node.module.rpartition(".")[2], item.name)
    return set()


def _check_names(path: Path, params: Params) -> None:
    study, methods = params.study, available_methods()
    _one_of(path, "study.dataset", study.dataset, DATASETS)
    if ":" not in study.network and study.network not in NETWORKS:
        raise UserError(f"{path}: study.network: '{study.network}' is not known."
                        f"{did_you_mean(study.network, NETWORKS)} Allowed: {NETWORKS_ALLOWED}")
    for name in study.methods:
        _one_of(path, "study.methods", name, methods)
        if name not in params.methods:
            raise UserError(f"{path}: methods.{name} is missing; give every method a block ('{name}: {{}}' if it has "
                            "no options)")
    for name in study.claims:
        _one_of(path, "study.claims", name, CLAIMS)
    for name in study.experiments:
        _one_of(path, "study.experiments", name, EXPERIMENTS)
    for key in ("methods", "seeds", "claims", "experiments"):
        names = getattr(study, key)
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UserError(f"{path}: study.{key} names {sorted(twice)} twice; name each once")
    for key in ("speed", "export"):
        for cell in getattr(params, key).cells:
            _one_of(path, f"{key}.cells", cell, params.cells, " (methods and seeds of the study; [] for none)")
    for name, block in params.methods.items():
        _one_of(path, "methods", name, methods)
        known = sorted(method_options(name)) if block else []  # parses the method's file, and those that it extends
        for key in block:
            _one_of(path, f"methods.{name}", key, known)


def _one_of(path: Path, key: str, seen: str, allowed, more: str = "") -> None:
    if seen not in allowed:
        names = ", ".join(allowed) or "nothing (the method has no options)"
        raise UserError(f"{path}: {key}: '{seen}' is not known.{did_you_mean(seen, allowed)} Allowed: {names}{more}")


def _message(path: Path, problem: ValidationError) -> str:
    lines = []
    for error in problem.errors():
        key = ".".join(str(part) for part in error["loc"]) or "(whole file)"
        if error["type"] == "extra_forbidden":
            allowed = sorted(_fields(error["loc"][:-1]))
            word = str(error["loc"][-1])
            lines.append(f"unknown key '{key}'.{did_you_mean(word, allowed)} Allowed here: {', '.join(allowed)}")
        elif error["type"] == "missing":
            lines.append(f"key '{key}' is missing; configs/default.yaml shows every key")
        else:
            lines.append(f"{key}: {error['msg'].removeprefix('Value error, ')} (seen: {_seen(error['input'])})")
    return f"{path}: " + f"\n       {path}: ".join(lines)


def _seen(value: Any) -> str:
    return repr(value.model_dump()) if isinstance(value, BaseModel) else repr(value)


def _fields(location: tuple) -> set[str]:
    """Field names of the section at ``location``."""
    section: Any = Params
    for part in location:
        field = section.model_fields[part].annotation
        section = next((kind for kind in (field, *get_args(field)) if hasattr(kind, "model_fields")), section)
    return set(section.model_fields)

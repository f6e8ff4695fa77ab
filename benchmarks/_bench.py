"""What experiments on single networks share: the study of params.yaml, without its test images, and its recipes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from _experiment import publish
from hobs_rspar import checkpoint, config, data, slicing, training
from hobs_rspar.allocation.expense import limited
from hobs_rspar.allocation.space import Space
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import repair
from hobs_rspar.device import resolve_device
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import timing
from hobs_rspar.methods import _registry
from hobs_rspar.methods._protocol import Context, FileInputs
from hobs_rspar.paths import Paths
from hobs_rspar.plan import PruningPlan
from hobs_rspar.seeds import generator


def budget_of_macs(params: config.Params, why: str) -> float:
    """The kept fraction of MACs.

    Raises:
        UserError: the study's budget is another one; ``why`` that will not do.
    """
    if params.study.budget.macs is None:
        raise UserError(f"params.yaml: study.budget.macs is null, but {why}; set it, and the latencies to null")
    return params.study.budget.macs


def publish_tables(params: config.Params, conditions: str, started: float, tables: list[dict]) -> None:
    """Publishes an experiment that judges no claim; ``started`` as by ``time.perf_counter``."""
    publish(params, {"claim": None, "measured": None, "lo": None, "hi": None, "unit": "", "holds": None, "reason": "",
                     "conditions": conditions, "seconds": round(time.perf_counter() - started, 1), "tables": tables})


class Bench:
    """The study of params.yaml, with one method's constants to be changed.

    Args:
        params: of the study.
        method: its name.
    """

    def __init__(self, params: config.Params, method: str):
        self.params, self.method, self.paths = params, method, Paths.of(params.study)
        self.device = resolve_device(params.device)
        network, self.spec = checkpoint.load_with_spec(self.paths.dense / "dense.safetensors")
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.groups = Groups.from_json(json.loads((self.paths.dense / "groups.json").read_text()))
        self.splits = {name: data.load(self.paths.data, name, self.device)
                       for name in ("train", "calibration", "validation")}

    def top1(self, constants: dict, seed: int) -> float:
        """Validation accuracy in percent after recovery."""
        torch.set_num_threads(self.params.allocation.threads)
        return self.recovered(self.pruned(self.plan(constants, seed)), seed)

    def plan(self, constants: dict, seed: int) -> PruningPlan:
        return _registry.method(self.method).plan(self.context(seed), _registry.options(self.method, constants))

    def recovered(self, network: nn.Module, seed: int,
                  after_step: Callable[[int], None] = lambda images: None) -> float:
        """Validation accuracy in percent after the study's recovery, which changes ``network``."""
        recipe = self.params.finetune
        teacher = self.network if recipe.distillation.weight > 0 else None
        task = training.Task(network, self.splits["train"], self.splits["validation"], recipe, seed, "finetune",
                             teacher, progress=after_step)
        return training.fit(task, training.State(), lambda state: None).history[-1]["validation_top1"]

    def validated(self, network: nn.Module) -> float:
        """Validation accuracy in percent of a network as it is."""
        images = self.splits["validation"]
        return training.accuracy(training.logits(network, images), images.labels)

    def speedups(self, networks: Sequence[nn.Module], batch: int, seconds: float) -> list[float]:
        """Time of the dense network / time of each, all timed in turns on the CPU."""
        device = torch.device("cpu")
        every = [timing.prepared(copy.deepcopy(network), device) for network in (self.network, *networks)]
        x = timing.example((batch, *self.spec.example().shape[1:]), device)
        dense, *others = (samples.median for samples in timing.measure(every, x, timing.Schedule(seconds)))
        return [dense / other for other in others]

    def context(self, seed: int) -> Context:
        allocation, asked = self.params.allocation, self.params.study.budget.model_dump()
        budget, expense = limited(self.groups, asked, json.loads(self.paths.latency.read_text()))
        space = Space(self.groups, budget, allocation.min_ratio, allocation.tolerance, expense, allocation.round_to)
        return Context(self.network, self.spec, space, self.method, seed, self.params.study.dataset,
                       {key: value for key, value in asked.items() if value is not None},
                       FileInputs(self.paths.dense, self.paths.data, self.device))

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """As the prune stage leaves it."""
        dense, _ = checkpoint.load_with_spec(self.paths.dense / "dense.safetensors")
        if plan.weights:
            dense = checkpoint.fit(dense, plan.weights, plan.method)
        pruned = slicing.remove(dense, self.groups, plan)
        dense, pruned = (network.to(self.device, memory_format=torch.channels_last) for network in (dense, pruned))
        options = self.params.prune
        repair.carry_out(plan, pruned, dense, self.groups, self.splits["calibration"].first(options.images), options,
                         generator(plan.seed, "prune", plan.method))
        return pruned

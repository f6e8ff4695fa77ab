"""Equal tuning for every method: ``python benchmarks/tuning.py METHOD``.

Draws as many sets of the method's constants as benchmarks/tuning.yaml says for all, runs allocation, surgery, repair
and recovery with each on the study of params.yaml, and compares them on validation images and seeds of development.
Nothing looks at test images, or at the study's seeds. Every trial is kept in ``reports/<study>/tuning/METHOD.json`` as
soon as it is done; a second run goes on from there. docs/methods.md shows the trials.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from _experiment import run

from hobs_rspar import checkpoint, config, data, surgery, training
from hobs_rspar.allocation.expense import limited
from hobs_rspar.allocation.space import Space
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import repair
from hobs_rspar.device import keep_freed_memory, resolve_device
from hobs_rspar.errors import UserError, did_you_mean
from hobs_rspar.methods import _registry
from hobs_rspar.methods._protocol import Context, FileInputs
from hobs_rspar.paths import Paths
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.seeds import derived_seed, generator
from hobs_rspar.strided import sliced

RANGES = Path(__file__).with_suffix(".yaml")


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
        plan = _registry.method(self.method).plan(self.context(seed), _registry.options(self.method, constants))
        recipe = self.params.finetune
        teacher = self.network if recipe.distillation.weight > 0 else None
        task = training.Task(self.pruned(plan), self.splits["train"], self.splits["validation"], recipe, seed,
                             "finetune", teacher)
        with sliced(task.network):
            return training.fit(task, training.State(), lambda state: None).history[-1]["validation_top1"]

    def context(self, seed: int) -> Context:
        allocation, asked = self.params.allocation, self.params.study.budget.model_dump()
        budget, expense = limited(self.groups, asked, json.loads(self.paths.latency.read_text()))
        space = Space(self.groups, budget, allocation.min_ratio, allocation.tolerance, expense)
        return Context(self.network, self.spec, space, self.method, seed, self.params.study.dataset,
                       {key: value for key, value in asked.items() if value is not None},
                       FileInputs(self.paths.dense, self.paths.data, self.device))

    def pruned(self, plan: PruningPlan) -> torch.nn.Module:
        """As the prune stage leaves it."""
        dense, _ = checkpoint.load_with_spec(self.paths.dense / "dense.safetensors")
        if plan.weights:
            dense = checkpoint.fit(dense, plan.weights, plan.method)
        pruned = surgery.remove(dense, self.spec.example(), plan)
        dense, pruned = (network.to(self.device, memory_format=torch.channels_last) for network in (dense, pruned))
        options = self.params.prune
        repair.carry_out(plan, pruned, dense, self.groups, self.splits["calibration"].first(options.images), options,
                         generator(plan.seed, "prune", plan.method))
        return pruned


def main() -> None:
    keep_freed_memory()
    asked, params = yaml.safe_load(RANGES.read_text()), config.load()
    method = named(sys.argv[1:], asked["methods"])
    if both := sorted(set(asked["seeds"]) & set(params.study.seeds)):
        raise UserError(f"{RANGES.name}: seeds: {both} are the study's own, which only confirm; name others")
    path = Paths.of(params.study).report / "tuning" / f"{method}.json"
    block = params.methods[method]
    trials = drawn(method, block, asked)
    done = json.loads(path.read_text())["trials"] if path.is_file() else []
    bench = Bench(params, method)
    for constants in bar(trials, f"tuning {method}"):
        if any(constants == trial["constants"] for trial in done):
            continue
        started = time.perf_counter()
        top1 = [bench.top1(block | constants, seed) for seed in asked["seeds"]]
        done.append({"constants": constants, "top1_validation": top1,
                     "seconds": round(time.perf_counter() - started, 1)})
        keep(path, params, method, asked, done)
    show(method, done)


def named(arguments: list[str], known: dict) -> str:
    """The method on the command line.

    Raises:
        UserError: there is none, or it has no ranges.
    """
    if len(arguments) != 1 or arguments[0] not in known:
        seen = arguments[0] if len(arguments) == 1 else ""
        raise UserError(f"usage: python benchmarks/tuning.py METHOD.{did_you_mean(seen, known)} Methods with constants "
                        f"to tune, in benchmarks/{RANGES.name}: {', '.join(known)}")
    return arguments[0]


def drawn(method: str, block: dict, asked: dict) -> list[dict]:
    """The tuned constants of all trials: those of params.yaml first."""
    random = np.random.default_rng(derived_seed(0, "tuning", method))
    ranges = asked["methods"][method]
    trials = [{name: block[name] for name in ranges}]
    while len(trials) < asked["trials"]:
        trials.append({name: between(random, *ends) for name, ends in ranges.items()})
    return trials


def between(random: np.random.Generator, low: float, high: float) -> float | int:
    """A number drawn on a logarithmic scale, to two digits; a whole one where both ends are."""
    value = float(np.exp(random.uniform(np.log(low), np.log(high))))
    return round(value) if isinstance(low, int) and isinstance(high, int) else float(f"{value:.2g}")


def keep(path: Path, params: config.Params, method: str, asked: dict, done: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"method": method, "seeds": asked["seeds"],
              "network": params.study.network, "dataset": params.study.dataset,
              "budget": params.study.budget.model_dump(exclude_none=True), "trials": done}
    path.write_text(json.dumps(record, indent=1) + "\n")


def show(method: str, done: list[dict]) -> None:
    for trial in sorted(done, key=lambda trial: -np.mean(trial["top1_validation"])):
        print(f"{np.mean(trial['top1_validation']):.2f} %  {trial['constants']}")


if __name__ == "__main__":
    run(main)

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
import yaml

from _bench import Bench
from _experiment import run
from hobs_rspar import config
from hobs_rspar.errors import UserError, did_you_mean
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.paths import Paths
from hobs_rspar.progress import bar
from hobs_rspar.seeds import derived_seed

RANGES = Path(__file__).with_suffix(".yaml")


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

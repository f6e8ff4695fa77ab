"""What foretells the accuracy of an allocation after recovery: ``python benchmarks/predictors.py`` (30 minutes).

A search can only afford rewards that are cheaper than a recovery. Random allocations that meet the budget are pruned in
H-OBS's order, repaired and recovered on training images by the study's recipe; every cheap predictor is compared with
the validation loss and accuracy after that by Spearman's rank correlation. Test images are not looked at.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.stats import spearmanr

from _allocation import Problem, load
from _experiment import run
from hobs_rspar import checkpoint, data, training
from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.fitted import FittedReward
from hobs_rspar.allocation.reward import SeparableReward
from hobs_rspar.device import resolve_device
from hobs_rspar.methods._rspar import curves
from hobs_rspar.paths import Paths
from hobs_rspar.progress import bar
from hobs_rspar.seeds import derived_seed

ALLOCATIONS, SEEDS = 30, (0, 1, 2)  # seeds of recovery, taken in turn: what foretells must do so in spite of them
SPREADS = (0.1, 0.2, 0.35)  # standard deviations of the log ratios, in turn
IMAGES, FEW = 20_000, 6_400  # training images of the recovery, and of the shortest one that serves as a predictor
MEASURED = 12  # allocations that the fitted reward may see; it is judged on the others
RESAMPLES = 2000


class Bench:
    """The study's network with everything that a predictor may ask for."""

    def __init__(self, problem: Problem):
        self.problem, paths = problem, Paths.of(problem.params.study)
        device = resolve_device(problem.params.device)
        network = checkpoint.load(paths.dense / "dense.safetensors").to(device, memory_format=torch.channels_last)
        self.train, self.validation, calibration = (data.load(paths.data, split, device)
                                                    for split in ("train", "validation", "calibration"))
        factors, _ = checkpoint.load_tensors(paths.dense / "factors.safetensors")
        self.order = [torch.argsort(score, stable=True) for score in problem.scores]
        self.teacher = network if problem.params.finetune.distillation.weight > 0 else None
        shared = (network, problem.space.groups, self.order, factors, calibration.first(256), self.validation)
        self.environment, self.raw = PruningEnvironment(*shared), PruningEnvironment(*shared, refit=False)
        relative = [torch.from_numpy(part) for part in problem.relative]
        self.curves = curves(problem.scores, self.order, relative)

    def recovered(self, rows: np.ndarray, images: int, what: str) -> np.ndarray:
        """Loss and accuracy (a fraction) of widths on validation images after recovery [n, 2].

        Args:
            rows: widths [n, groups].
            images: training images of each recovery.
            what: name of the progress bar.
        """
        seeds = np.resize(SEEDS, len(rows)).tolist()
        return np.array([self._recovered(row, images, seed) for row, seed in zip(bar(rows, what), seeds)])

    def _recovered(self, widths: np.ndarray, images: int, seed: int) -> tuple[float, float]:
        recipe = self.problem.params.finetune.model_copy(update={"epochs": 1, "images": images, "crops": []})
        network = self.environment.repaired(widths)
        task = training.Task(network, self.train, self.validation, recipe, seed, "predictors", self.teacher)
        last = training.fit(task, training.State(), lambda state: None).history[-1]
        return last["validation_loss"], last["validation_top1"] / 100


def main() -> None:
    started = time.perf_counter()
    problem = load()
    bench, widths = Bench(problem), sample(problem)
    outcomes = bench.recovered(widths, IMAGES, "predictors: recovery")
    found = {name: predict(widths) for name, predict in predictors(bench).items()}
    rows = [row(name, values, *outcomes.T) for name, values in found.items()]
    fitted = FittedReward(bench.curves, widths[:MEASURED], -found["repaired: loss"][:MEASURED])
    rest = slice(MEASURED, None)
    rows.append(row(f"reward fitted to {MEASURED} measured allocations (on the other {ALLOCATIONS - MEASURED})",
                    fitted.score(widths[rest]), *outcomes[rest].T))
    problem.publish(record(problem, sorted(rows, key=lambda entry: -entry["loss"]), outcomes, started))


def sample(problem: Problem) -> np.ndarray:
    """Uniform widths and random allocations around them [ALLOCATIONS, groups]."""
    generator = np.random.default_rng(derived_seed(0, "predictors", "allocations"))
    spread = np.resize(SPREADS, ALLOCATIONS - 1)[:, None]
    noise = generator.normal(0, 1, (ALLOCATIONS - 1, len(problem.space.sizes))) * spread
    return np.concatenate([problem.space.uniform[None], problem.space.project(np.exp(noise))])


def predictors(bench: Bench) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> values [n] of allocations [n, groups]; higher foretells better."""
    problem, sizes = bench.problem, bench.problem.space.sizes
    loss, relative = (SeparableReward([curve[:, column] for curve in bench.curves]) for column in (0, 1))
    fisher = [part.double().cumsum(0).flip(0).numpy() for part in _in_order(bench, "fisher")]
    diagonal = SeparableReward([np.append(part, 0.0) for part in fisher])
    return {
        "H-OBS: predicted loss, summed over groups": loss.score,
        "H-OBS: relative output error, summed": relative.score,
        "joint second-order model of the gates": problem.joint().score,
        "diagonal Fisher of the gates, summed": diagonal.score,
        "mean log kept ratio": lambda widths: np.log(widths / sizes).mean(1),
        "batch norms re-estimated: loss": _each(lambda row: -bench.raw.evaluate(row).loss),
        "repaired: loss": _each(lambda row: -bench.environment.evaluate(row).loss),
        "repaired: accuracy": _each(lambda row: bench.environment.evaluate(row).accuracy),
        f"repaired, after {FEW // 128} steps of training: loss":
            lambda widths: -bench.recovered(widths, FEW, "predictors: a few steps")[:, 0],
    }


def _in_order(bench: Bench, name: str) -> list[torch.Tensor]:
    parts = bench.problem.gates[name].split(bench.problem.space.sizes.tolist())
    return [part[order] for part, order in zip(parts, bench.order)]


def _each(value: Callable[[np.ndarray], float]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda widths: np.array([value(row) for row in bar(widths, "predictors: forward passes")])


def row(name: str, values: np.ndarray, loss: np.ndarray, accuracy: np.ndarray) -> dict:
    """Rank correlations with (minus) the loss and with the accuracy after recovery, with bootstrap intervals."""
    generator = np.random.default_rng(derived_seed(0, "predictors", name))
    drawn = generator.integers(len(values), size=(RESAMPLES, len(values)))
    several = [spearmanr(values[index], -loss[index]).statistic for index in drawn]
    lo, hi = np.nanquantile(several, (0.025, 0.975))
    return {"predictor": name, "loss": float(spearmanr(values, -loss).statistic), "lo": float(lo), "hi": float(hi),
            "accuracy": float(spearmanr(values, accuracy).statistic), "n": len(values)}


def record(problem: Problem, rows: list[dict], outcomes: np.ndarray, started: float) -> dict:
    loss, accuracy = outcomes.T
    columns = [["predictor", "Predictor"], ["n", "Allocations"], ["loss", "ρ with −loss after recovery"],
               ["lo", "95 % from"], ["hi", "to"], ["accuracy", "ρ with accuracy after recovery"]]
    note = (f"Spearman's rank correlation over random allocations at equal MACs; recovery with {IMAGES:,} training "
            f"images, seeds {SEEDS[0]} to {SEEDS[-1]} in turn; validation images. Accuracy after recovery lies "
            f"between {100 * accuracy.min():.2f} and {100 * accuracy.max():.2f} %, loss between {loss.min():.4f} and "
            f"{loss.max():.4f}; uniform widths: {100 * accuracy[0]:.2f} %, {loss[0]:.4f}. Intervals: bootstrap over "
            "allocations.")
    table = {"name": "predictors", "title": f"What foretells accuracy after recovery: {problem.subject}", "note": note,
             "columns": columns, "rows": [{**entry, **{key: round(entry[key], 3) for key in ("loss", "lo", "hi",
                                                                                             "accuracy")}}
                                          for entry in rows]}
    return {"claim": None, "measured": None, "lo": None, "hi": None, "unit": "", "holds": None, "reason": "",
            "conditions": problem.subject, "seconds": round(time.perf_counter() - started, 1), "tables": [table]}


if __name__ == "__main__":
    run(main)

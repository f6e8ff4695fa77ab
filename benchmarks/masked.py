"""AdaPrune's masked sparsity at the study's budget, after the study's recovery: ``python benchmarks/masked.py``.

Its zeros leave every tensor as large as it was, so it is compared in a table of its own, on validation images: accuracy
before and after a recovery in which the zeros stay, and what a dense kernel gains by them. It takes as long as a
recovery of the dense network for each direction and seed.
"""

import copy
import statistics as plain

import torch
from _dense_study import DenseStudy
from _experiment import run

from hobs_rspar import adaprune, data, training
from hobs_rspar.data import Images
from hobs_rspar.device import keep_freed_memory
from hobs_rspar.errors import UserError
from hobs_rspar.evidence.statistics import mean_interval
from hobs_rspar.hardware import timing
from hobs_rspar.progress import bar

DIRECTIONS = {"input": 16, "output": 16}  # channels along which a group lies, and weights in it
BATCH, SECONDS = 64, 4  # of the timing, for both networks together
COLUMNS = [["direction", "Groups along"], ["n", "n"], ["top1", "Top-1 (%)"], ["top1_lo", "95 % from"],
           ["top1_hi", "to"], ["top1_before_recovery", "Before recovery (%)"], ["macs_ratio", "MACs not by zero"],
           ["weights_ratio", "Weights not zero"], ["speedup", f"Speedup, batch {BATCH}"]]


def main() -> None:
    keep_freed_memory()
    study = DenseStudy.load()
    budget = study.params.study.budget.macs
    if budget is None:
        raise UserError("params.yaml: study.budget.macs is null, but masked weights save no time that a latency budget "
                        "could limit; set it, and the latencies to null")
    rows = [row(study, direction, group, budget) for direction, group in DIRECTIONS.items()]
    seeds = len(study.params.study.seeds)
    note = ("Validation images; T16 has the other methods' validation accuracy. A surrogate of AdaPrune, by its "
            f"abstract: equally many zeros in every group of {max(DIRECTIONS.values())} weights. Mean over {seeds} "
            "seeds of recovery, with the t interval where there are several. Speedup: dense time / masked time in "
            "PyTorch's dense kernels, which multiply by zeros; on an accelerator that skips them: not measured, none "
            "is at hand.")
    table = {"name": "masked", "title": f"Masked sparsity at {budget:g}x MACs: {study.subject}", "note": note,
             "columns": COLUMNS, "rows": rows}
    study.publish(None, {"measured": None, "lo": None, "hi": None, "unit": "", "holds": None, "reason": "",
                         "conditions": study.subject, "tables": [table]})


def row(study: DenseStudy, direction: str, group: int, budget: float) -> dict:
    """The outcome of one direction over the study's seeds."""
    example = study.calibration.normalised(study.calibration.pixels[:1])
    masks = adaprune.masks(study.network, example, budget, direction, group)
    masked = copy.deepcopy(study.network)
    adaprune.hold(masked, masks)
    train = data.load(study.paths.data, "train")
    after = [recovered(study, masked, masks, train, seed) for seed in bar(study.params.study.seeds, direction)]
    interval = mean_interval(after, study.params.report.confidence) if len(after) > 1 else None
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    return {"direction": f"{direction} channels", "n": len(after), "top1": round(plain.fmean(after), 2),
            "top1_lo": interval and round(interval.lo, 2), "top1_hi": interval and round(interval.hi, 2),
            "top1_before_recovery": round(validated(masked, study.validation), 2),
            "macs_ratio": round(adaprune.kept_macs(masked, example, masks), 4),
            "weights_ratio": round(1 - zeros / sum(p.numel() for p in masked.parameters()), 4),
            "speedup": round(speedup(study, masked), 3)}


def recovered(study: DenseStudy, masked: torch.nn.Module, masks: adaprune.Masks, train: Images, seed: int) -> float:
    """Validation accuracy in percent after the study's recovery, with the zeros held."""
    network, recipe = copy.deepcopy(masked), study.params.finetune
    teacher = study.network if recipe.distillation.weight > 0 else None
    task = training.Task(network, train, study.validation, recipe, seed, "finetune", teacher,
                         progress=lambda images: adaprune.hold(network, masks))
    return training.fit(task, training.State(), lambda state: None).history[-1]["validation_top1"]


def validated(network: torch.nn.Module, images: Images) -> float:
    return training.accuracy(training.logits(network, images), images.labels)


def speedup(study: DenseStudy, masked: torch.nn.Module) -> float:
    """Time of the dense network / time of the masked one, timed in turns."""
    networks = [timing.prepared(copy.deepcopy(network), torch.device("cpu")) for network in (study.network, masked)]
    image = study.calibration.normalised(study.calibration.pixels[:1])
    x = timing.example((BATCH, *image.shape[1:]), image.device)
    return timing.compare(*networks, x, timing.Schedule(SECONDS)).speedup


if __name__ == "__main__":
    run(main)

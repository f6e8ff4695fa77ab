"""Invented cells, in the form that the benchmark stage writes, for tests of the report. Not measurements."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("unpruned", "random", "random_repair", "l1", "l1_repair", "l2_global", "taylor_oneshot", "depgraph_seed",
           "hobs_uniform", "hobs_rspar")
REPAIRED = ("random_repair", "l1_repair", "hobs_uniform", "hobs_rspar")
SEEDS = (42, 2024, 10086, 520, 1314)
GROUPS = {"conv1": 16, "layer1.0.conv1": 16, "layer1.1.conv1": 16, "layer1.2.conv1": 16, "layer2.0.conv1": 32,
          "layer2.0.conv2": 32, "layer2.1.conv1": 32, "layer2.2.conv1": 32, "layer3.0.conv1": 64,
          "layer3.0.conv2": 64, "layer3.1.conv1": 64, "layer3.2.conv1": 64}
TOP1 = {"unpruned": 93.4, "random": 90.2, "random_repair": 90.9, "l1": 91.1, "l1_repair": 91.4, "l2_global": 90.8,
        "taylor_oneshot": 91.6, "depgraph_seed": 91.3, "hobs_uniform": 91.9, "hobs_rspar": 92.4,
        "hobs_rspar_no_repair": 92.0}
BEFORE = {"unpruned": 93.5, "random": 14.0, "random_repair": 66.0, "l1": 22.0, "l1_repair": 70.0, "l2_global": 19.0,
          "taylor_oneshot": 41.0, "depgraph_seed": 30.0, "hobs_uniform": 76.0, "hobs_rspar": 81.0,
          "hobs_rspar_no_repair": 30.0}
IMAGES = 2000
FULL = 106_000  # images of the study's recovery
DENSE = {"macs": 31_000_000, "params": 270_000, "top1_test": 93.3, "top1_validation": 93.6}
PLATFORM = "test_cpu"


def make_study(folder: Path, methods=METHODS, seeds=SEEDS, name: str = "default", curve=(), **study) -> Path:
    """Writes params.yaml, cells, timings, dense.json and scores.json of a whole invented study into ``folder``."""
    params = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text())
    params["study"] |= {"name": name, "dataset": "fashion_mnist", "network": "resnet20", "methods": list(methods),
                        "seeds": list(seeds), "margin_points": 0.17,
                        "budget": {"macs": 0.26, "latency_ms": None, "latency_ratio": None}} | study
    params["finetune"]["curve"] = list(curve)
    params["benchmark"] |= {"platform": None, "batch_sizes": [1, 64]}
    params["speed"]["cells"] = [f"{method}-{seeds[0]}" for method in methods]
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    dense = folder / "artifacts" / "dense" / "fashion_mnist_resnet20"
    write(dense / "dense.json", {"network": "resnet20", "dataset": "fashion_mnist", "classes": 10, "epochs": 11,
                                 "top5_test": 99.8, **DENSE})
    write(dense / "scores.json", scores())
    for method in methods:
        for seed in seeds:
            make_cell(folder, method, seed, name, curve)
    return folder


def make_cell(folder: Path, method: str, seed: int, name: str = "default", curve=()) -> None:
    """Writes one cell and its timing."""
    generator = np.random.default_rng([seed, list(TOP1).index(method)])
    report = folder / "reports" / name
    key = f"{method}-{seed}"
    write(report / "cells" / f"{key}.json", cell(method, seed, name, generator, curve))
    write(report / "platforms" / PLATFORM / f"{key}.json", timing(key, method, generator))


def add_speed(folder: Path, cell: str, name: str = "default") -> None:
    """Writes what pipeline/speed.py would find of a cell, whose records are there."""
    report, (method, _, _) = folder / "reports" / name, cell.rpartition("-")
    modes = [{"run": "eager", "dtype": dtype, "batchnorm": "as trained", "batch": batch, "dense_p50_ms": 2.0 * batch,
              "pruned_p50_ms": 1.0 * batch, "pruned_p90_ms": 1.1 * batch, "pruned_p99_ms": 1.2 * batch, "speedup": 2.0,
              "speedup_lo": 1.9, "speedup_hi": 2.1, "processes": 3, "reason": ""}
             for dtype in ("fp32", "bf16") for batch in (1, 64)]
    modes.append({"run": "compiled", "dtype": "fp32", "batchnorm": "as trained", "batch": 64,
                  "reason": "not measured: no compiler"})
    calls = [{"layer": f"conv{place}", "kind": "convolution", "macs": 1000 * place, "bytes": 500,
              "shape": [64, 8, 4, 4], "milliseconds": 0.1 * place} for place in (1, 2, 3)]
    calls.append({"layer": "relu", "kind": "activation", "macs": 0, "bytes": 500, "shape": [64, 8, 4, 4],
                  "milliseconds": 0.4})
    write(report / "cells" / "speed" / f"{cell}.json", {
        "cell": cell, "method": method, "platform": PLATFORM, "modes": modes, "operators_batch": 64,
        "fingerprint": {"device": "A CPU", "threads": 1, "torch": "2"},
        "operators": {"dense": calls, method: calls}, "ceilings": {"macs": 2e7, "bytes": 1e7},
        "inputs": json.loads((report / "cells" / f"{cell}.json").read_text())["inputs"]})


def write(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))


def edit(file: Path, change) -> None:
    """Applies ``change`` to the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    write(file, content)


def scores() -> dict:
    """scores.json with decaying H-OBS scores."""
    generator = np.random.default_rng(0)
    groups = [{"name": group, "channels": width, "macs_share": 1 / len(GROUPS),
               "scores": {"hobs": (generator.exponential(size=width) ** 3 * 0.1 / width).tolist(),
                          "l1": generator.random(width).tolist()}}
              for group, width in GROUPS.items()]
    return {"groups": groups}


def cell(method: str, seed: int, name: str, generator, curve=()) -> dict:
    """One cell as in reports/<study>/cells/."""
    # The same images are hard for every method, as in a real study.
    hardness = np.random.default_rng(7).random(IMAGES) + generator.normal(0, 0.004, IMAGES)
    correct = hardness < (TOP1[method] + generator.normal(0, 0.1)) / 100
    test, before = 100 * float(correct.mean()), BEFORE[method] + float(generator.normal(0, 1.5))
    ratio = 1.0 if method == "unpruned" else 0.26 + float(generator.uniform(-0.002, 0.002))
    history = [{"epoch": epoch, "images": 53_000 * epoch, "train_loss": 0.3 / epoch, "validation_loss": 0.25,
                "validation_top1": TOP1[method] - 2 + epoch} for epoch in (1, 2)]
    search = _search(generator) if method == "hobs_rspar" else None
    repaired = method in REPAIRED
    bits = base64.b64encode(np.packbits(correct).tobytes()).decode()
    return {
        "cell": f"{method}-{seed}", "method": method, "seed": seed, "study": name, "dataset": "fashion_mnist",
        "network": "resnet20", "budget": {"macs": 0.26}, "dense": DENSE,
        "plan": {"macs": round(31e6 * ratio), "params": round(27e4 * ratio), "macs_ratio": ratio,
                 "params_ratio": ratio, "decided_by": "ppo" if search else "uniform", "digest": "0" * 64,
                 "groups": _groups(method, generator)},
        "accuracy": {"before_repair": before - 5, "after_repair": before, "validation": test + 0.2, "test": test,
                     "test_top5": 99.5},
        "reconstruction_error": 0.1, "repair": "least_squares" if repaired else "none",
        "repair_steps": _repair_steps(before, repaired), "test_images": IMAGES, "correct": bits,
        "recovery_curve": _recovery_curve(before, test, bits, curve), "history": history, "search": search,
        "precision": "fp32",
        "cost": {"training_images": FULL, "extra_training_images": 0,
                 "search_evaluations": 24 if search else 0, "search_images": 24 * 1280 if search else 0,
                 "seconds": {"allocate": 8.0 if search else 0.5, "prune": 1.0, "finetune": 60.0}},
        "inputs": "0" * 64}


def _repair_steps(before: float, repaired: bool) -> dict:
    tops = {"cut": before - 5, "batchnorm": before - 2, "refit": before} if repaired else \
        {"cut": before, "batchnorm": min(94.0, before + 20)}
    return {step: {"top1": top1, "reconstruction_error": 0.9 - 0.3 * place}
            for place, (step, top1) in enumerate(tops.items())}


def _recovery_curve(before: float, test: float, bits: str, curve) -> list[dict]:
    """Accuracy rises evenly with the logarithm of the images."""
    share = {images: np.log(images) / np.log(FULL) for images in curve}
    tops = {0: before - 0.3} | {images: before + (test - before) * float(part) for images, part in share.items()}
    return [{"images": images, "seen": images // 128 * 128, "top1_validation": top1 + 0.2, "top1_test": top1,
             "correct": bits} for images, top1 in (tops | {FULL: test}).items()]


def timing(key: str, method: str, generator) -> dict:
    """One timing as in reports/<study>/platforms/<platform>/."""
    speed = 1.0 if method == "unpruned" else 2.9 + 0.05 * list(TOP1).index(method) + float(generator.normal(0, 0.03))
    batches = {}
    for size, milliseconds in (("1", 1.9), ("64", 60.0)):
        gain = speed if size == "64" else 1 + (speed - 1) / 3
        batches[size] = {"dense": _times(milliseconds, int(size)), "pruned": _times(milliseconds / gain, int(size)),
                         "speedup": gain, "speedup_lo": gain * 0.98, "speedup_hi": gain * 1.02}
    return {"cell": key, "platform": PLATFORM,
            "fingerprint": {"device": "Test CPU @ 2.1 GHz", "torch": "2.13.0+cpu", "threads": 1, "os": "Linux"},
            "conditions": {"mode": "eager", "dtype": "fp32", "layout": "channels_last", "threads": 1,
                           "batchnorm": "as trained"},
            "batches": batches, "peak_memory_mb": {"dense": 40.0, "pruned": 30.0}, "energy": None,
            "energy_reason": "not measured: no RAPL counter on this machine",
            "power_reason": "not measured: no counter",
            "bounds": {"lo": 1.0, "hi": 3.9}, "flags": [], "inputs": "0" * 64}


def _times(milliseconds: float, size: int) -> dict:
    return {"p50_ms": milliseconds, "p90_ms": 1.1 * milliseconds, "p99_ms": 1.3 * milliseconds,
            "mean_ms": 1.02 * milliseconds, "std_ms": 0.05 * milliseconds, "throughput": 1000 * size / milliseconds,
            "iterations": 100}


def _groups(method: str, generator) -> list[dict]:
    def kept(width: int) -> int:
        if method == "unpruned":
            return width
        varied = method in ("hobs_rspar", "l2_global", "taylor_oneshot")
        return max(2, round(width * (generator.uniform(0.2, 0.9) if varied else 0.5)))
    return [{"name": group, "channels": width, "kept_count": kept(width), "reason": "invented"}
            for group, width in GROUPS.items()]


def _search(generator) -> dict:
    """Three rounds of 24 policy updates; 12 plans measured before, 4 after each round."""
    drops = 0.2 + 0.4 * np.exp(-np.arange(72) / 25) + generator.normal(0, 0.02, 72)
    episodes = [{"episode": 64 * (update + 1), "reward": -float(drop) - 0.005, "accuracy_drop": float(drop),
                 "penalty": 0.4, "lambda": float(0.01 * np.exp(-2.5 * drop)), "raw_macs_ratio": 0.35,
                 "macs_ratio": 0.26} for update, drop in enumerate(drops)]
    measured = [{"updates": before, "accuracy_drop": 0.5 - before / 200 + float(generator.normal(0, 0.05)),
                 "loss": 1.4 - before / 100, "macs_ratio": 0.26}
                for before in [0] * 12 + [24] * 4 + [48] * 4 + [72] * 4]
    return {"evaluations": 24, "images": 24 * 1280, "chosen": "lowest loss", "episodes": episodes,
            "measured": measured}

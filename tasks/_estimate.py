"""How long cells take: from the recorded times of those that have run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from hashlib import md5
from pathlib import Path
from statistics import mean

import yaml

import _task  # noqa: F401  (it makes the package importable)
from hobs_rspar.config import Params
from hobs_rspar.paths import Paths

STAGES = ("allocate", "prune", "finetune")
START_SECONDS = 3.0  # a stage's own start (DVC, Python, PyTorch), about this on two busy cores


def recorded(params: Params) -> dict[str, float]:
    """Seconds that allocation, surgery and recovery of each cell took when they last ran here."""
    paths = Paths.of(params.study)
    times = {}
    for cell in params.cells:
        files = [paths.cost(cell, stage) for stage in STAGES]
        if all(file.exists() for file in files):
            times[cell] = sum(json.loads(file.read_text())["seconds"] for file in files)
    return times


def made_with(params: Params, *stages: str) -> bool:
    """Whether what shared stages left here was made with the params of now, as dvc.lock tells.

    Studies share ``data/<data set>`` and ``artifacts/dense``: what lies there may be of another image folder. A file
    that is missing is none of another study's.
    """
    lock = Path("dvc.lock")
    text = lock.read_text() if lock.is_file() else ""
    return all(_up_to_date(params, text, stage) for stage in stages)


def _up_to_date(params: Params, lock: str, stage: str) -> bool:
    found = re.search(rf"^  {stage}:\n(?:   .*\n)*", lock, re.MULTILINE)  # parsing all of it takes seconds
    if found is None:
        return False
    entry = yaml.safe_load(found[0])[stage]
    same = all(_value(params, key) == value for key, value in entry["params"]["params.yaml"].items())
    small = [(Path(out["path"]), out["md5"]) for out in entry["outs"] if out["path"].endswith(".json")]
    return same and all(not path.is_file() or md5(path.read_bytes()).hexdigest() == seen for path, seen in small)


def _value(params: Params, key: str):
    """A param by its dotted name, as YAML has it."""
    value = params.model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def experiment_seconds(params: Params) -> list[float]:
    """Seconds that the experiments of benchmarks/ took, as far as they have run."""
    files = [Paths.of(params.study).claims / f"{name}.json" for name in experiments(params)]
    return [json.loads(file.read_text())["seconds"] for file in files if file.exists()]


def experiments(params: Params) -> list[str]:
    return [*params.study.claims, *params.study.experiments]


def expected(cell: str, times: dict[str, float]) -> float:
    """A cell's own recorded time, else the mean over its method's cells, else over all cells."""
    method = [seconds for other, seconds in times.items() if other.rpartition("-")[0] == cell.rpartition("-")[0]]
    return times.get(cell) or mean(method or times.values())


def total(params: Params, cells: dict[str, float], jobs: int) -> float:
    """Wall seconds of some cells: side by side up to recovery, then benchmarks and modes one after the other.

    Args:
        params: of the study.
        cells: seconds of every cell's allocation, surgery and recovery.
        jobs: cells at once.
    """
    side_by_side = sum(cells.values()) + len(cells) * len(STAGES) * START_SECONDS
    alone = len(cells) * (params.benchmark.seconds + START_SECONDS) + START_SECONDS
    return side_by_side / max(1, min(jobs, len(cells))) + alone + speed_seconds(params, cells)


def speed_seconds(params: Params, cells: Iterable[str]) -> float:
    """Timed seconds of the cells that are measured in every mode, without what compiling takes."""
    options = params.speed
    modes = 4 * len(options.batch_sizes) + 2 * len(options.compiled)
    each = options.processes * (modes * options.seconds + START_SECONDS)
    return each * sum(cell in options.cells for cell in cells)


def remaining(params: Params, cells: list[str], jobs: int) -> str:
    """A sentence about the time that some cells will take."""
    times = recorded(params)
    if cells and not times:
        return "time left: not known, no cell has run here; 'make preview' measures and estimates"
    seconds = total(params, {cell: expected(cell, times) for cell in cells}, jobs)
    return f"time left: about {in_words(seconds)} with JOBS={jobs} (from the recorded times of cells)"


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

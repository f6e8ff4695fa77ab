"""Reads the cells and timings that params name, and refuses to mix what must not be compared. Imports no torch."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hobs_rspar.config import Params
from hobs_rspar.errors import UserError
from hobs_rspar.evidence import claim_files
from hobs_rspar.hardware.record import CellFiles
from hobs_rspar.paths import Paths

CELL_KEYS = ("method", "seed", "dataset", "network", "budget", "dense", "plan", "accuracy", "repair", "repair_steps",
             "recovery_curve", "history", "cost", "inputs")
SPEED_KEYS = ("method", "fingerprint", "modes", "operators", "operators_batch", "ceilings", "inputs")
TIMING_KEYS = ("fingerprint", "conditions", "batches", "inputs")
# What makes two timings incomparable. Clocks and temperatures drift within one run and are only recorded.
COMPARED = ("device", "host_cpu", "driver", "cuda", "cudnn", "torch", "torch_kernels", "threads", "power_cap", "mode",
            "dtype", "layout", "batchnorm")


@dataclass(frozen=True)
class Evidence:
    """Everything that the report is made of.

    Attributes:
        cells: cell key to the content of its file, in the order of params.
        timings: cell key to its timing on ``platform``; one of an earlier recovered network counts as absent.
        missing: cells of params without a file.
        leftover: files in cells/ that params do not name; not used.
        dense: content of dense.json, empty where the file is absent or of another network than the cells'.
        scores: content of scores.json, None likewise.
        experiments: name to the result of an experiment of benchmarks/.
        latency: content of latency.json, None where the file is absent.
        elsewhere: timings of the same networks on other platforms, by platform and cell.
        speed: what the speed stage found of single cells, by cell; one of an earlier recovered network is absent.
    """

    params: Params
    paths: Paths
    cells: dict[str, dict]
    timings: dict[str, dict]
    missing: list[str]
    leftover: list[Path]
    platform: str | None
    dense: dict
    scores: dict | None
    experiments: dict[str, claim_files.ClaimFile]
    latency: dict | None
    elsewhere: dict[str, dict[str, dict]]
    speed: dict[str, dict]

    @property
    def methods(self) -> list[str]:
        """Methods with at least one cell, in the order of params."""
        return list(dict.fromkeys(cell["method"] for cell in self.cells.values()))

    @property
    def precisions(self) -> list[str]:
        """In which cells were recovered: bf16 or fp32, or both where machines differ; earlier cells don't say."""
        return sorted({cell["precision"] for cell in self.cells.values() if "precision" in cell})

    @property
    def untimed(self) -> list[str]:
        return [cell for cell in self.cells if cell not in self.timings]

    @property
    def stale(self) -> list[str]:
        """Cells whose network was recovered anew since they were written, as far as networks are here."""
        files = {key: CellFiles(self.paths, cell["method"], cell["seed"]) for key, cell in self.cells.items()}
        return [key for key, file in files.items() if file.plan.is_file() and file.recovered.is_file()
                and file.digest() != self.cells[key]["inputs"]]

    @property
    def reference(self) -> dict:
        """The dense network's MACs, parameters and accuracy; the same in every cell."""
        return next(iter(self.cells.values()))["dense"]

    @property
    def fingerprint(self) -> dict:
        """Device, versions and conditions of the timings; empty where nothing is timed."""
        return _merged(next(iter(self.timings.values()))) if self.timings else {}

    @property
    def alpha(self) -> float:
        """Two-sided level that belongs to ``report.confidence``."""
        return round(1 - self.params.report.confidence, 12)

    def of(self, method: str) -> list[dict]:
        return [cell for cell in self.cells.values() if cell["method"] == method]

    def timed(self, method: str) -> list[dict]:
        return [self.timings[key] for key, cell in self.cells.items() if cell["method"] == method and
                key in self.timings]


def read(params: Params) -> Evidence:
    """Reads exactly the cells that params name, with their timings.

    Raises:
        UserError: there is no cell at all; a file is truncated; cells of another budget or another dense network are
            among them; timings of several platforms or fingerprints would be mixed; a claim file is none.
    """
    paths = Paths.of(params.study)
    files = {cell: paths.cell_report(cell) for cell in params.cells}
    cells = {cell: _load(file, CELL_KEYS) for cell, file in files.items() if file.is_file()}
    if not cells:
        raise UserError(f"{paths.report}/cells/ holds none of the {len(files)} cells that params.yaml names "
                        f"({params.cells[0]}, …); 'dvc repro' computes them all, "
                        f"'dvc repro -s benchmark@{params.cells[0]}' the last stage of one")
    for cell, content in cells.items():
        _check_same_study(files[cell], content, params)
    _check_same_dense(cells)
    platform = _platform(params, paths, cells)
    timings = _timings(paths, platform, cells)
    _check_same_fingerprint(timings, f"{paths.report}/platforms/{platform}")
    dense, scores = _of_dense(paths, next(iter(cells.values()))["dense"])
    leftover = sorted(file for file in (paths.report / "cells").glob("*.json") if file not in files.values())
    return Evidence(params, paths, cells, timings, [cell for cell in files if cell not in cells], leftover, platform,
                    dense or {}, scores, claim_files.read(paths.claims), _optional(paths.latency),
                    {other: found for other in _held(paths, cells) if other != platform
                     if (found := _timings(paths, other, cells))}, _speed(params, paths, cells))


def _of_dense(paths: Paths, wanted: dict) -> tuple[dict | None, dict | None]:
    """dense.json and scores.json, where they are of the network that the cells were pruned from.

    Studies of one network on one data set share their folder: another study's may lie there.
    """
    dense = _optional(paths.dense / "dense.json")
    if dense is not None and any(dense.get(key) != value for key, value in wanted.items()):
        return None, None
    return dense, _optional(paths.dense / "scores.json")


def correctness(cells: list[dict]) -> np.ndarray | None:
    """Per-image correctness on the test set, [cells, images] booleans; None where a cell has none."""
    if any(not cell.get("correct") for cell in cells) or len({cell["test_images"] for cell in cells}) != 1:
        return None
    packed = [np.frombuffer(base64.b64decode(cell["correct"]), dtype=np.uint8) for cell in cells]
    return np.stack([np.unpackbits(bits, count=cells[0]["test_images"]) for bits in packed]).astype(bool)


def _load(file: Path, keys: tuple[str, ...]) -> dict:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} is not valid JSON ({problem}); delete it and run 'dvc repro -s "
                        f"benchmark@{file.stem}'") from None
    absent = [key for key in keys if key not in content]
    if absent:
        raise UserError(f"{file} has no '{absent[0]}'; it must hold {', '.join(keys)}: delete it and run 'dvc repro "
                        f"-s benchmark@{file.stem}'")
    return content


def _optional(file: Path) -> dict | None:
    return _load(file, ()) if file.is_file() else None


def _check_same_study(file: Path, cell: dict, params: Params) -> None:
    study = params.study
    wanted = {"dataset": study.dataset, "network": study.network, "budget": _set(study.budget.model_dump())}
    for key, value in wanted.items():
        seen = _set(cell[key]) if key == "budget" else cell[key]
        if seen != value:
            raise UserError(f"{file}: {key} is {seen}, but params.yaml says {value}; cells of different studies are "
                            "never compared: 'dvc repro' renews it")


def _set(budget: dict) -> dict:
    return {key: value for key, value in budget.items() if value is not None}


def _check_same_dense(cells: dict[str, dict]) -> None:
    seen: dict[str, list[str]] = {}
    for key, cell in cells.items():
        seen.setdefault(json.dumps(cell["dense"], sort_keys=True), []).append(key)
    if len(seen) > 1:
        rare = min(seen.values(), key=len)
        raise UserError(f"cells of {len(seen)} different dense networks are mixed ({', '.join(rare[:3])} against the "
                        "others); differences between them mean nothing: 'dvc repro' renews them")


def _platform(params: Params, paths: Paths, cells: dict[str, dict]) -> str | None:
    folder, held = paths.report / "platforms", _held(paths, cells)
    wanted = params.benchmark.platform
    if wanted is not None:
        if held and wanted not in held:
            raise UserError(f"benchmark.platform is '{wanted}', but timings of this study's cells are only in "
                            f"{folder}/ for: {', '.join(held)}; name one of them, or run 'dvc repro'")
        return wanted
    if len(held) > 1:
        raise UserError(f"{folder}/ holds timings of {len(held)} platforms ({', '.join(held)}); set benchmark.platform "
                        "in params.yaml to the one that the report should show")
    return held[0] if held else None


def _held(paths: Paths, cells: dict[str, dict]) -> list[str]:
    """Platforms with a timing of one of the cells' networks; where there is none, those that timed earlier ones."""
    every = {file.parent.name for cell in cells for file in (paths.report / "platforms").glob(f"*/{cell}.json")}
    return sorted(name for name in every if _timings(paths, name, cells)) or sorted(every)


def _timings(paths: Paths, platform: str | None, cells: dict[str, dict]) -> dict[str, dict]:
    """Timings of exactly the networks that the cells describe; both records hold the same digest."""
    if platform is None:
        return {}
    files = {cell: paths.platform_report(platform, cell) for cell in cells}
    found = {cell: _load(file, TIMING_KEYS) for cell, file in files.items() if file.is_file()}
    return {cell: timing for cell, timing in found.items() if timing["inputs"] == cells[cell]["inputs"]}


def _speed(params: Params, paths: Paths, cells: dict[str, dict]) -> dict[str, dict]:
    files = {cell: paths.cell_report(f"speed/{cell}") for cell in params.speed.cells if cell in cells}
    found = {cell: _load(file, SPEED_KEYS) for cell, file in files.items() if file.is_file()}
    return {cell: record for cell, record in found.items() if record["inputs"] == cells[cell]["inputs"]}


def _merged(timing: dict) -> dict:
    return {**timing["conditions"], **timing["fingerprint"]}


def _check_same_fingerprint(timings: dict[str, dict], folder: str) -> None:
    for key in COMPARED:
        seen: dict[str, list[str]] = {}
        for cell, timing in timings.items():
            seen.setdefault(json.dumps(_merged(timing).get(key), sort_keys=True), []).append(cell)
        if len(seen) > 1:
            groups = "; ".join(f"{value}: {cells[0]}" + (f" and {len(cells) - 1} more" if cells[1:] else "")
                               for value, cells in seen.items())
            rare = min(seen.values(), key=len)
            raise UserError(f"{folder}: the timings' {key} differs ({groups}); timings of different conditions are "
                            f"never compared: measure again with 'dvc repro -f -s benchmark@{rare[0]}'")

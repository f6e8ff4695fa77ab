"""The two JSON records of a cell: what it is (``cells/``) and how fast it is on a platform (``platforms/``).

The first is put together from the files of the earlier stages and holds no timing of the network.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from hobs_rspar.errors import UserError
from hobs_rspar.paths import Paths

COST_STAGES = ("allocate", "prune", "finetune")
LAST_STEP = {"none": "cut", "batchnorm": "batchnorm", "least_squares": "refit"}  # of each repair


@dataclass(frozen=True)
class CellFiles:
    """Where the earlier stages left what a cell's records are made of."""

    paths: Paths
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.seed}"

    @property
    def dense(self) -> Path:
        return self.paths.dense / "dense.safetensors"

    @property
    def recovered(self) -> Path:
        return self.paths.cell(self.name) / "recovered.safetensors"

    @property
    def plan(self) -> Path:
        return self.paths.cell(self.name) / "plan.json"

    def read(self, stage: str) -> dict:
        """The JSON that ``stage`` (dense, plan, prune, recovery) wrote.

        Raises:
            UserError: the file is missing or no JSON.
        """
        folder = self.paths.dense if stage == "dense" else self.paths.cell(self.name)
        return read_json(folder / f"{stage}.json", self._maker(stage))

    def require(self) -> None:
        """Fails early, before anything is measured.

        Raises:
            UserError: a file is missing.
        """
        for path, stage in ((self.dense, "dense"), (self.plan, "plan"), (self.recovered, "recovery")):
            if not path.is_file():
                raise UserError(f"{path} not found; run '{self._maker(stage)}'")

    def require_macs(self, macs: int) -> None:
        """The recovered network must be the one that surgery left.

        Raises:
            UserError: its MACs differ from those in prune.json.
        """
        expected = self.read("prune")["macs"]
        if macs != expected:
            raise UserError(f"{self.recovered} has {macs} MACs, but prune.json says {expected}: the files are of "
                            f"different runs; run '{self._maker('recovery')}'")

    def digest(self) -> str:
        """SHA-256 over the recovered network and the plan."""
        return hashlib.sha256(self.recovered.read_bytes() + self.plan.read_bytes()).hexdigest()

    def _maker(self, stage: str) -> str:
        name = {"dense": "pretrain", "plan": f"allocate@{self.name}", "prune": f"prune@{self.name}"}
        return f"dvc repro {name.get(stage, f'finetune@{self.name}')}"


def read_json(path: Path, command: str) -> dict:
    """A JSON file that ``command`` makes.

    Raises:
        UserError: it is missing, or no JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} not found; run '{command}'") from None
    except ValueError as problem:
        raise UserError(f"{path} is not valid JSON ({problem}); delete it and run '{command}'") from None


def write_json(path: Path, record: dict) -> None:
    """Writes atomically: a reader never sees half a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def cell_record(files: CellFiles, params) -> dict:
    """What ``reports/<study>/cells/<cell>.json`` holds.

    Args:
        files: of the cell.
        params: of the study.

    Raises:
        UserError: a file is missing, or the plan is another network's or budget's.
    """
    study, dense, plan = params.study, files.read("dense"), files.read("plan")
    prune, recovery = files.read("prune"), files.read("recovery")
    _require_same(files, plan, {"network": study.network, "dataset": study.dataset, "method": files.method,
                                "seed": files.seed})
    return {"cell": files.name, "method": files.method, "seed": files.seed, "study": study.name,
            "dataset": study.dataset, "network": study.network, "budget": plan["budget"],
            "dense": {key: dense[key] for key in ("macs", "params", "top1_test", "top1_validation")},
            "plan": _plan(plan, prune, files.plan), "accuracy": _accuracy(prune, recovery),
            "reconstruction_error": _repaired(prune)["reconstruction_error"], "repair": prune["repair"],
            "repair_steps": prune["repair_steps"], "recovery_curve": recovery["recovery_curve"],
            "precision": recovery["precision"], "history": recovery["history"],
            "test_images": recovery["test_images"], "correct": recovery["correct"],
            "search": _search(plan["search"]), "cost": _cost(files, plan, recovery), "inputs": files.digest()}


def platform_record(files: CellFiles, platform: str, fingerprint: dict, measured: dict) -> dict:
    """What ``reports/<study>/platforms/<platform>/<cell>.json`` holds."""
    return {"cell": files.name, "platform": platform, "fingerprint": fingerprint, **measured,
            "inputs": files.digest()}


def _require_same(files: CellFiles, plan: dict, wanted: dict) -> None:
    for key, value in wanted.items():
        if plan[key] != value:
            raise UserError(f"{files.plan}: {key} is '{plan[key]}', but params.yaml and the command want '{value}'; "
                            f"run 'dvc repro allocate@{files.name}'")


def _plan(plan: dict, prune: dict, path: Path) -> dict:
    """What was decided, and the size that surgery counted."""
    groups = [{"name": group["name"], "channels": group["channels"], "kept_count": len(group["kept"]),
               "reason": group["reason"]} for group in plan["groups"]]
    size = {key: prune[key] for key in ("macs", "params", "macs_ratio", "params_ratio")}
    return size | {"decided_by": plan["decided_by"], "digest": hashlib.sha256(path.read_bytes()).hexdigest(),
                   "groups": groups}


def _accuracy(prune: dict, recovery: dict) -> dict:
    """Top-1 in percent: before recovery and ``validation`` on validation images, the last two on test images."""
    return {"before_repair": prune["repair_steps"]["cut"]["top1"], "after_repair": _repaired(prune)["top1"],
            "validation": recovery["top1_validation"], "test": recovery["top1_test"],
            "test_top5": recovery["top5_test"]}


def _repaired(prune: dict) -> dict:
    """The last step of repair: the network that goes on."""
    return prune["repair_steps"][LAST_STEP[prune["repair"]]]


def _search(search: dict | None) -> dict | None:
    """The search without each episode's ratios, which stay in plan.json."""
    if search is None:
        return None
    episodes = [{key: value for key, value in episode.items() if key != "ratios"} for episode in search["episodes"]]
    return search | {"episodes": episodes}


def _cost(files: CellFiles, plan: dict, recovery: dict) -> dict:
    search = plan["search"] or {"evaluations": 0, "images": 0}
    return {"training_images": recovery["training_images"], "extra_training_images": plan["extra_training_images"],
            "search_evaluations": search["evaluations"], "search_images": search["images"],
            "seconds": {stage: _seconds(files.paths.cost(files.name, stage)) for stage in COST_STAGES}}


def _seconds(path: Path) -> float | None:
    """Wall time of a stage; None when its outputs came from the cache, so that nobody measured it here."""
    return json.loads(path.read_text())["seconds"] if path.is_file() else None

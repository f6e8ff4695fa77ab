"""Runs the study of params.yaml where DVC is not: ``python tasks/without_dvc.py [--minutes N] [--only WORD ...]``.

For a machine with a GPU that has PyTorch and little else. Stages, their order and what they depend on are those of
dvc.yaml; a stage whose command, files and params are as they were when it last ended is not run again. Where machines
are lent for minutes, ``--minutes`` begins no stage after that time, and the same command goes on later; training goes
on from its last epoch anyway. Results lie where DVC would have them, but stay outside dvc.lock: cells carry the digests
of what they were made from.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from _task import FOLDER, check_options, only_one, run
from hobs_rspar import config
from hobs_rspar.errors import UserError
from hobs_rspar.paths import Paths

STAMPS = FOLDER / "without_dvc"


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml with its names filled in; ``params`` are dotted keys of params.yaml."""

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no stage after so many minutes")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD",
                        help="stages whose name begins with one of these, such as data, finetune@l1-7")
    options = parser.parse_args()
    params = config.load()
    check_options(params)
    Paths.of(params.study).claims.mkdir(parents=True, exist_ok=True)  # the report's, claims or not
    values = yaml.safe_load(Path("params.yaml").read_text())
    todo = [stage for stage in stages(yaml.safe_load(Path("dvc.yaml").read_text())["stages"], values)
            if not options.only or stage.name.startswith(tuple(options.only))]
    if not todo:
        raise UserError(f"--only {' '.join(options.only)}: no stage of dvc.yaml begins so; such are data, pretrain, "
                        "finetune@l1-42")
    with only_one("tasks/without_dvc.py"):
        failed = reproduce(todo, values, 60 * options.minutes)
    if failed:
        raise UserError(f"{len(failed)} stages failed: {', '.join(failed)}; their messages are above, everything else "
                        "is kept, and the same command tries them again")


def reproduce(todo: list[Stage], values: dict, seconds: float) -> list[str]:
    """Runs what is stale; the names of the stages that failed."""
    started, failed, lost = time.monotonic(), [], set()
    for place, stage in enumerate(todo, 1):
        if time.monotonic() - started > seconds:
            sys.exit(f"{seconds / 60:g} minutes are over: {len(todo) - place + 1} of {len(todo)} stages are left; the "
                     "same command goes on from here")
        if not done(stage, values, lost, f"[{place}/{len(todo)}]"):
            failed.append(stage.name)
            lost |= set(stage.outs)
    return failed


def done(stage: Stage, values: dict, lost: set[str], place: str) -> bool:
    """Runs a stage unless nothing has changed since it ended; whether its results are there.

    Args:
        stage: of dvc.yaml.
        values: of params.yaml.
        lost: outputs of stages that failed; what lies there is of an earlier time.
        place: among all stages, in words.
    """
    missing = [name for name in stage.deps if name in lost or not Path(name).exists()]
    if missing:
        print(f"{place} {stage.name}: left out, {missing[0]} is missing or of an earlier time", file=sys.stderr)
        return False
    stamp, now = STAMPS / f"{stage.name}.json", json.dumps(state(stage, values), indent=1)
    if stamp.is_file() and stamp.read_text() == now and all(Path(name).exists() for name in stage.outs):
        return True
    print(f"{place} {stage.name}", flush=True)
    stamp.unlink(missing_ok=True)  # a stage that is killed has not ended
    if subprocess.run([sys.executable, *shlex.split(stage.cmd)[1:]]).returncode:  # a command is "python SCRIPT ..."
        return False
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(now)
    return True


def state(stage: Stage, values: dict) -> dict:
    """Everything that a stage's results follow from."""
    return {"cmd": stage.cmd, "deps": {name: digest(Path(name)) for name in stage.deps},
            "params": {key: at(values, key) for key in stage.params}}


def digest(path: Path) -> str:
    """Of a file, or of all files in a folder and their names."""
    files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file}\n".encode() + hashlib.sha256(file.read_bytes()).digest())
    return whole.hexdigest()


def stages(defined: dict[str, dict], values: dict) -> Iterator[Stage]:
    """Every stage in an order in which they can run: dvc.yaml's, where stages of one matrix go item by item."""
    for matrix, block in itertools.groupby(defined.items(), lambda part: part[1].get("matrix", {})):
        entries = list(block)
        for item in items(matrix, values):
            yield from (_stage(name, entry, values, item) for name, entry in entries)


def items(matrix: dict[str, str], values: dict) -> list[dict]:
    """What a ``matrix`` goes through: one dictionary for each of its stages."""
    lists = {key: at(values, text.strip("${}")) for key, text in matrix.items()}
    return [dict(zip(lists, chosen)) for chosen in itertools.product(*lists.values())]


def _stage(name: str, entry: dict, values: dict, item: dict) -> Stage:
    def filled(text: str) -> str:
        return re.sub(r"\$\{([^}]+)\}", lambda found: str(at(values | {"item": item}, found[1])), text)

    def names(key: str) -> tuple[str, ...]:
        return tuple(filled(next(iter(part)) if isinstance(part, dict) else part) for part in entry.get(key, []))

    suffix = f"@{'-'.join(map(str, item.values()))}" if item else ""
    return Stage(name + suffix, filled(entry["cmd"]), names("deps"), names("params"),
                 names("outs") + names("metrics"))


def at(values: dict, key: str):
    """The value at a dotted key.

    Raises:
        UserError: params.yaml has no such key.
    """
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            raise UserError(f"params.yaml has no '{key}', which dvc.yaml names")
        values = values[part]
    return values


if __name__ == "__main__":
    run(main)

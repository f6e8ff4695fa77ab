"""What DVC knows about the study, read once: the stages, what they need, what is up to date. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

CELL_KINDS = ("allocate", "prune", "finetune")
EXPERIMENT_KINDS = ("claim", "experiment")  # scripts of benchmarks/
TIMED = ("sensitivity", "allocators", "rounding", "peers", "masked")  # experiments that measure time
MISSING = {"deleted", "not in cache"}


@dataclass(frozen=True)
class Graph:
    """The graph of stages and its state.

    Attributes:
        order: every stage name, upstream first.
        upstream: the stages whose outputs a stage reads.
        producer: which stage writes a file or folder.
        pending: the stages that ``dvc repro`` would run, each with what changed: file, param or command -> how.
    """

    order: list[str]
    upstream: dict[str, set[str]]
    producer: dict[str, str]
    pending: dict[str, dict[str, str]]

    @property
    def cells(self) -> dict[str, list[str]]:
        """The stages of every cell up to recovery, in the order in which they run."""
        cells: dict[str, list[str]] = {}
        for stage in self.order:
            if kind(stage) in CELL_KINDS:
                cells.setdefault(cell(stage), []).append(stage)
        return cells

    def downstream_of(self, stages: Iterable[str]) -> set[str]:
        """The stages and everything that reads, directly or not, what they write."""
        reached = set(stages)
        for stage in self.order:
            if self.upstream[stage] & reached:
                reached.add(stage)
        return reached

    def changed(self) -> set[str]:
        """Pending for a better reason than that files are missing: these an edit has changed."""
        return {stage for stage, changes in self.pending.items() if set(changes.values()) - MISSING}

    def with_what_they_need(self, stages: set[str]) -> set[str]:
        """The stages and those that must run first because a file that is needed is not there."""
        needed = set(stages)
        for stage in reversed(self.order):
            if stage in needed:
                lost = [path for path, how in self.pending.get(stage, {}).items() if how == "deleted"]
                needed |= {self.producer[path] for path in lost if path in self.producer} - {stage}
        return needed


def kind(stage: str) -> str:
    return stage.partition("@")[0]


def cell(stage: str) -> str:
    return stage.partition("@")[2]


def read() -> Graph:
    """Reads dvc.yaml, dvc.lock and the state of every file they name.

    Like ``dvc status``, in half the time, and also while stages run: DVC reads its files twice there, and locks every
    file that it looks at, which fails for those that a running stage writes.
    """
    from dvc.repo import Repo
    from dvc.stage import Stage
    from networkx import topological_sort

    with _params_parsed_once(), _files_hashed_once(), Repo(_wait_for_lock=True) as repo, repo.lock:
        graph = repo.index.graph
        stages = list(topological_sort(graph.reverse()))
        pending = {name: _flat(changes) for stage in stages
                   for name, changes in Stage.status.__wrapped__(stage).items()}
    upstream = {stage.addressing: {before.addressing for before in graph.successors(stage)} for stage in stages}
    producer = {str(out): stage.addressing for stage in stages for out in stage.outs}
    return Graph([stage.addressing for stage in stages], upstream, _with_parents_of(producer, graph), pending)


def _with_parents_of(producer: dict[str, str], graph) -> dict[str, str]:
    """Adds the dependencies that are a file inside a folder that a stage writes."""
    for stage in graph:
        for dependency in map(str, stage.deps):
            owner = next((producer[str(up)] for up in Path(dependency).parents if str(up) in producer), None)
            if owner and dependency not in producer:
                producer[dependency] = owner
    return producer


def _flat(changes: list) -> dict[str, str]:
    """``[{"changed deps": {path: how}}, "changed command"]`` as one dictionary; params are named by their key."""
    flat: dict[str, str] = {}
    for change in changes:
        if isinstance(change, str):
            flat[change] = "modified"
            continue
        for entry in change.values():
            for name, how in entry.items():
                flat.update(how if isinstance(how, dict) else {name: how})
    return flat


def mend_rwlock() -> None:
    """Takes from DVC's list of the files in use what a run that was stopped has left there.

    DVC itself forgives an entry whose process is gone, and refuses every stage until a person removes the list where
    another program has that process's number meanwhile, or where the list was cut short while it was written. Its guard
    is held: nobody is writing the list now; the caller holds the checkout's lock.
    """
    from dvc.lock import Lock
    from dvc.rwlock import SCHEMA, Invalid

    used = Path(".dvc/tmp/rwlock")
    if not used.exists():
        return
    with Lock(str(used.with_name("rwlock.lock")), wait=True):
        try:
            before = SCHEMA(json.loads(used.read_text()))
        except (ValueError, Invalid):
            used.unlink()
            return
        left = _in_use(before)
        if left != before:
            used.write_text(json.dumps(left))


def _in_use(entries: dict) -> dict:
    """The entries (``{"write": {path: process}, "read": {path: [process]}}``) whose processes are still at work."""
    readers = {path: [info for info in infos if _at_work(info)] for path, infos in entries["read"].items()}
    return {"write": {path: info for path, info in entries["write"].items() if _at_work(info)},
            "read": {path: infos for path, infos in readers.items() if infos}}


def _at_work(info: dict) -> bool:
    """Whether the process of this number runs this command: DVC writes down ``" ".join(sys.argv)``."""
    try:
        line = psutil.Process(info["pid"]).cmdline()  # of a process that has ended and was not waited for: []
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True  # somebody else's, of which nothing is known
    if any(" ".join(line[start:]) == info["cmd"] for start in range(len(line))):
        return True
    if "-m" not in line[:-1]:
        return False
    module, *arguments = line[line.index("-m") + 1:]  # Python puts the module's file in the place of its name
    file, end = info["cmd"], " ".join(["", *arguments])
    return file.endswith(end) and f"/{module.replace('.', '/')}" in file.removesuffix(end)


@contextmanager
def _files_hashed_once() -> Iterator[None]:
    """DVC looks every file up again for each of the stages that depend on it, a quarter of the time of a status."""
    from dvc.output import Output

    original, known = Output.get_hash, {}

    def get_hash(output):
        if output.fs_path not in known:
            known[output.fs_path] = original(output)
        return known[output.fs_path]

    Output.get_hash = get_hash
    try:
        yield
    finally:
        Output.get_hash = original


@contextmanager
def _params_parsed_once() -> Iterator[None]:
    """DVC parses params.yaml again for every stage, two thirds of the time of a status; here nothing writes it."""
    import dvc.dependency.param as module

    original = module.load_path
    module.load_path = lru_cache(maxsize=None)(original)
    try:
        yield
    finally:
        module.load_path = original

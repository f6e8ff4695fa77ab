"""Where the study stands: ``python tasks/status.py [--jobs N]``. Reads DVC's state and the cells' reports."""

from __future__ import annotations

import argparse
import json
from collections import Counter

import _graph
from _estimate import remaining
from _task import FAILED, default_jobs, run, who_works
from hobs_rspar import config
from hobs_rspar.paths import Paths

EXPLAINED = {"done": "", "failed": "stopped with an error", "stale": "something they depend on has changed",
             "missing": "have not run"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="cells at once, for the time that is left")
    params, graph = config.load(), _graph.read()
    jobs = parser.parse_args().jobs or default_jobs(params)
    failures = json.loads(FAILED.read_text()) if FAILED.exists() else {}
    touched = graph.downstream_of(graph.changed())
    states = {cell: state(cell, touched, graph, Paths.of(params.study), failures) for cell in params.cells}
    print(headline(params, states))
    if working := who_works():
        print(f"running: {working}; its cells count as missing or stale until they are finished")
    for name in ("failed", "stale", "missing"):
        describe(name, [cell for cell, found in states.items() if found == name], failures)
    describe_shared(graph, touched)
    left = [cell for cell, found in states.items() if found != "done"]
    print(remaining(params, left, jobs) if left or touched else "everything is up to date")


def state(cell: str, touched: set[str], graph: _graph.Graph, paths: Paths, failures: dict[str, str]) -> str:
    """One of ``done``, ``failed``, ``stale``, ``missing``; ``touched`` are the stages that an edit reaches."""
    pending = touched & {*graph.cells.get(cell, []), f"benchmark@{cell}"}
    if cell in failures and pending:
        return "failed"
    if not paths.cell_report(cell).exists():
        return "missing"
    return "stale" if pending else "done"


def headline(params: config.Params, states: dict[str, str]) -> str:
    study, counts = params.study, Counter(states.values())
    budget = next(f"{key} {value:g}" for key, value in study.budget.model_dump().items() if value is not None)
    found = ", ".join(f"{counts[name]} {name}" for name in EXPLAINED if counts[name])
    return (f"study {study.name}: {study.dataset}, {study.network}, budget {budget}, {len(study.methods)} methods x "
            f"{len(study.seeds)} seeds\ncells: {found} of {len(states)}")


def describe(name: str, cells: list[str], failures: dict[str, str]) -> None:
    if cells and name == "failed":
        print("\n".join([f"failed ({EXPLAINED[name]}):", *(f"  {cell}: {failures[cell]}" for cell in cells)]))
    elif cells:
        print(f"{name} ({EXPLAINED[name]}): {', '.join(cells)}")


def describe_shared(graph: _graph.Graph, touched: set[str]) -> None:
    """The stages that belong to no cell, where an edit has touched them, and what is merely not on this disk."""
    for stage in graph.order:
        if _graph.kind(stage) not in (*_graph.CELL_KINDS, "benchmark") and stage in graph.changed():
            reasons = [what for what, how in graph.pending[stage].items() if how not in _graph.MISSING]
            print(f"{stage}: to run, because of {', '.join(reasons[:3])}")
    absent = [stage for stage in graph.pending if stage not in touched]
    if absent:
        print(f"{len(absent)} stages are unchanged, but files of theirs are not on this disk: 'make update' leaves "
              "them alone, 'make repro' computes them again")


if __name__ == "__main__":
    run(main)

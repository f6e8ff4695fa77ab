"""Runs the study: ``python tasks/repro.py [--jobs N] [--changed-only]``.

One job is plain ``dvc repro``. With more, what all cells share runs first, then the claims' experiments and whole cells
side by side (one DVC process each), then everything that must run alone: experiments that measure time, benchmarks,
report. A failed cell leaves the others intact.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import _graph
from _task import FAILED, check_options, default_jobs, only_one, run
from _workers import Failure, end_orphans, run_cells, stop_workers
from hobs_rspar import config
from hobs_rspar.errors import UserError
from hobs_rspar.paths import Paths

STAGE_FAILED = ("a stage failed (its message is above); what is finished is kept; repair it and run 'make repro' "
                "again")
DVC = str(Path(__file__).resolve().with_name("_dvc.py"))
DVC_REPRO = [sys.executable, DVC, "--wait-for-lock", "repro"]


def main() -> None:
    options, params = arguments(), config.load()
    jobs = default_jobs(params) if options.jobs is None else options.jobs
    if not Path(".git").exists():
        raise UserError("no Git repository here, and DVC needs one; clone the repository, or 'git init' this copy")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started this with it ignored
    started = time.monotonic()
    with only_one("make repro"):
        try:
            failures = reproduce(params, jobs, options.changed_only)
        except (KeyboardInterrupt, SystemExit):
            stop_workers()
            sys.exit("\nstopped; what is finished is kept, the same command goes on from here")
        remember(failures)
    conclude(params, failures, time.monotonic() - started)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, help="cells at once (default: number of cores; on a GPU, 1)")
    parser.add_argument("--changed-only", action="store_true",
                        help="only what an edit changed, and what that needs; not what is merely missing")
    options = parser.parse_args()
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"JOBS={options.jobs}: at least one cell must run at a time; JOBS=2 runs two")
    return options


def reproduce(params: config.Params, jobs: int, changed_only: bool) -> list[Failure]:
    """Runs every pending stage in three phases; returns the failed cells."""
    end_orphans(DVC)
    _graph.mend_rwlock()
    graph = _graph.read()
    todo = pending(graph, changed_only)
    if not todo:
        print("everything is up to date")
        return []
    check_options(params)
    if jobs == 1 and not changed_only:
        return serially(graph)
    before, after = phases(graph)
    if todo & set(before):
        dvc_repro([stage for stage in before if stage in todo])
        graph, todo = reread(changed_only)  # what came out as it was makes nothing after it stale
    runs = patterns(graph, todo)
    alone = {run: runs.pop(run) for run in list(runs) if _graph.cell(run) in _graph.TIMED}
    failures = run_cells([*DVC_REPRO, "--single-item", "--glob"], runs, alone, jobs)
    if not failures and not changed_only:
        dvc_repro()
        return []
    graph, todo = reread(changed_only)
    todo -= graph.downstream_of(stage for failure in failures
                                for stage in graph.cells.get(failure.cell, [failure.cell]))
    if todo & set(after):
        dvc_repro([stage for stage in after if stage in todo])
    return failures


def reread(changed_only: bool) -> tuple[_graph.Graph, set[str]]:
    graph = _graph.read()
    return graph, pending(graph, changed_only)


def patterns(graph: _graph.Graph, todo: set[str]) -> dict[str, str]:
    """Experiments and cells with stages to run, and a pattern for those: DVC reads its files again for every name.

    The last cells come first: methods that search stand there, and a long cell at the end would leave cores idle.
    """
    experiments = [stage for stage in graph.order if stage in todo and _graph.kind(stage) in _graph.EXPERIMENT_KINDS]
    initials = "".join(kind[0] for kind in _graph.CELL_KINDS)
    cells = {cell: f"[{initials}]*@{cell}" for cell in reversed(cells_of(graph, todo))}
    return {name: name for name in experiments} | cells


def cells_of(graph: _graph.Graph, stages: set[str]) -> list[str]:
    """The cells that have one of these stages before the benchmark."""
    return [cell for cell, own in graph.cells.items() if stages & set(own)]


def pending(graph: _graph.Graph, changed_only: bool) -> set[str]:
    changed = graph.changed() if changed_only else set(graph.pending)
    return graph.with_what_they_need(graph.downstream_of(changed))


def phases(graph: _graph.Graph) -> tuple[list[str], list[str]]:
    """The stages before all cells and experiments, and those after them; both run alone."""
    middle = {stage for stages in graph.cells.values() for stage in stages}
    middle |= {stage for stage in graph.order if _graph.kind(stage) in _graph.EXPERIMENT_KINDS}
    after = graph.downstream_of(middle) - middle
    return [stage for stage in graph.order if stage not in middle | after], \
        [stage for stage in graph.order if stage in after]


def serially(graph: _graph.Graph) -> list[Failure]:
    """Plain ``dvc repro``; afterwards, the cells that are still pending are the failed ones."""
    if run_dvc([*DVC_REPRO, "--keep-going"]) == 0:
        return []
    left = set(_graph.read().pending)
    failed = list(reversed(patterns(graph, left)))
    if left & set(phases(graph)[0]) or not failed:
        raise UserError(STAGE_FAILED)
    return [Failure(cell, "its message is above") for cell in failed]


def dvc_repro(stages: list[str] | None = None) -> None:
    """Runs just these stages (None: all that are left), one after the other, in one DVC process."""
    command = DVC_REPRO if stages is None else [*DVC_REPRO, "--single-item", *stages]
    if run_dvc(command):
        raise UserError(STAGE_FAILED)


def run_dvc(command: list[str]) -> int:
    """Runs DVC and waits. ``subprocess.run`` would kill it when this process is stopped, and leave its stage behind."""
    return subprocess.Popen(command).wait()


def remember(failures: list[Failure]) -> None:
    """Leaves the failed cells to ``make status``."""
    FAILED.write_text(json.dumps({failure.cell: failure.reason for failure in failures}))


def conclude(params: config.Params, failures: list[Failure], seconds: float) -> None:
    """Says where the results are, or which cells failed and why."""
    if failures:
        reasons = "\n".join(f"       {failure.cell}: {failure.reason}" for failure in failures)
        raise UserError(f"{len(failures)} of {len(params.cells)} cells failed, the others are finished:\n{reasons}\n"
                        "       repair and run 'make repro' again; only these cells and the report will run")
    report = Paths.of(params.study).report
    from hobs_rspar.evidence import front, readme, studies  # scipy: a run that does nothing need not wait for it
    from hobs_rspar.evidence.table_formats import files

    readme.update("README.md", report)
    front.update(report.parent)
    every = studies.across(report.parent)
    for name, text in files(every).items() if every else ():
        (report.parent / name).write_text(text)
    print(f"{report}/index.html  {report}/tables/T1.md  ({seconds / 60:.1f} min)")


if __name__ == "__main__":
    run(main)

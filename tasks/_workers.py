"""Cells side by side: one DVC process per cell, as many at once as there are jobs."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from tqdm import tqdm

LOGS = Path(".study/logs")


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish, and the line of its log that says why."""

    cell: str
    reason: str


def run_cells(command: list[str], cells: dict[str, str], alone: dict[str, str], jobs: int) -> list[Failure]:
    """Runs every cell, given with the pattern of its stages; prints a line per finished one; returns the failed.

    Args:
        command: what a pattern is given to.
        cells: those that run side by side.
        alone: those that run one after the other, when all others are done, because they measure time.
        jobs: cells at once.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    progress = Progress(len(cells) + len(alone))
    try:
        return in_pool(command, cells, jobs, progress) + in_pool(command, alone, 1, progress)
    finally:
        progress.bar.close()


def in_pool(command: list[str], cells: dict[str, str], jobs: int, progress: Progress) -> list[Failure]:
    """Runs cells, so many at once; on an exception nothing more is started."""
    failures: list[Failure] = []
    pool = ThreadPoolExecutor(jobs)
    try:
        running = {pool.submit(run_cell, command, cell, pattern): cell for cell, pattern in cells.items()}
        for future in as_completed(running):
            cell, code = running[future], future.result()
            if code:
                failures.append(Failure(cell, reason(cell)))
            progress.finished(failures[-1].reason if code else closing_line(cell), bool(code), cell)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return failures


def run_cell(command: list[str], cell: str, pattern: str) -> int:
    """One DVC process for the whole cell: it starts once, and no two processes share a stage."""
    log(cell).unlink(missing_ok=True)  # what a killed run left behind may still write into the old file
    with log(cell).open("w") as output:
        return subprocess.run([*command, pattern], stdout=output, stderr=subprocess.STDOUT, check=False).returncode


def stop_workers() -> None:
    """Ends this process's children and theirs, stages included, and waits for them."""
    end(psutil.Process().children(recursive=True))


def end_orphans(script: str) -> None:
    """Ends what a killed run left at work, with its stages: it would keep this run from the files that it writes.

    Args:
        script: path of the script that such processes run; the caller holds the checkout's lock, so that no other run
            is there whose they could be.
    """
    left = [process for process in psutil.process_iter(["cmdline"]) if script in (process.info["cmdline"] or [])]
    for process in left:
        with suppress(psutil.NoSuchProcess):
            end([process, *process.children(recursive=True)])


def end(processes: list[psutil.Process]) -> None:
    """Asks processes to end, and kills those that have not done so after a while."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=10)[1]:
        process.kill()


def log(cell: str) -> Path:
    return LOGS / f"{cell}.log"


def closing_line(cell: str) -> str:
    """What the cell's last stage said; a cell of which nothing had to run says nothing."""
    wanted = " -> " if "@" in cell else f" {cell}: "  # an experiment ends with the file that it wrote
    lines = [line for line in log(cell).read_text().splitlines() if wanted in line]
    return lines[-1] if lines else f"{cell}: restored from the cache"


def reason(cell: str) -> str:
    """The line that says why a cell failed: a stage's own error rather than DVC's remark that there was one."""
    lines = [line for line in log(cell).read_text().splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("error: ")] or [line for line in lines if "ERROR: " not in line]
    return f"{(said or lines or ['no message'])[-1].removeprefix('error: ')} ({log(cell)})"


class Progress:
    """A bar on a terminal; everywhere, a line per finished cell with the time that is left."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.monotonic()
        self.bar = tqdm(total=total, unit="cell", disable=not sys.stderr.isatty(), leave=False)

    def finished(self, line: str, failed: bool, cell: str) -> None:
        self.done += 1
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        mark = f"FAILED {cell}: " if failed else ""
        self.bar.write(f"[{self.done}/{self.total}, about {left / 60:.1f} min left] {mark}{line}", file=sys.stdout)
        sys.stdout.flush()
        self.bar.update()

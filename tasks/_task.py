"""What every task shares: the way to the package, errors without a traceback, one writer per checkout."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

ROOT = Path(__file__).resolve().parents[1]
STARTED_IN = Path.cwd()  # what a path on the command line is relative to
FOLDER = Path(".study")  # logs and locks of this checkout, ignored by Git
FAILED, LOCK, HOLDER = FOLDER / "failed.json", FOLDER / "lock", FOLDER / "holder"
sys.path.insert(0, str(ROOT / "pipeline"))

from _stage import run as _run  # noqa: E402  (the line above makes it importable; it makes the package importable)
from hobs_rspar.errors import UserError  # noqa: E402


def run(main: Callable[[], None]) -> None:
    """Runs ``main`` from the repository's root; a UserError becomes one line on stderr and exit status 1."""
    os.chdir(ROOT)
    _run(main)


def check_options(params) -> None:
    """Checks every method's options before anything expensive begins; loads the methods, which takes two seconds.

    Raises:
        UserError: an option has the wrong type or is out of range.
    """
    from hobs_rspar.methods import _registry

    for name in params.study.methods:
        _registry.options(name, params.methods[name])


def default_jobs(params) -> int:
    """Cells at once: as many as there are cores for their threads; one where they would share a GPU's memory."""
    if params.device != "cpu" and gpus():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // params.finetune.threads)


def gpus() -> int:
    """Number of NVIDIA GPUs, asked of the driver: importing torch for it would take a second."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        return 0


@contextmanager
def only_one(command: str) -> Iterator[None]:
    """Holds the checkout's lock; the system frees it even when this process is killed.

    Raises:
        UserError: another process holds it; the message names that process.
    """
    FOLDER.mkdir(exist_ok=True)
    lock = FileLock(LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{HOLDER.read_text()} is already working in this checkout; wait for it, or stop it with "
                        "Ctrl-C where it runs") from None
    with lock:
        HOLDER.write_text(f"'{command}' (process {os.getpid()}, since {datetime.now():%H:%M:%S})")
        yield


def who_works() -> str:
    """The command that holds the checkout's lock, and its process; empty if there is none."""
    FOLDER.mkdir(exist_ok=True)
    try:
        with FileLock(LOCK, timeout=0):
            return ""
    except Timeout:
        return HOLDER.read_text()

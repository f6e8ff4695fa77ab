"""Temporary copies of this checkout, uncommitted files included, in which tests run the commands that people run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

import _graph

ROOT = Path(__file__).resolve().parents[1]
DOWNLOADS = Path("data/downloads")  # raw files of data sets: shared by all copies, so that they are fetched once
RERUN = "reports/toy/"  # results of who ran the toy study here, or a test would find nothing to do


@dataclass(frozen=True)
class Clone:
    """A Git repository of its own in ``path`` with everything that is (or would be) tracked here."""

    path: Path

    @classmethod
    def of_checkout(cls, path: Path) -> Clone:
        """Copies the working tree, but for what is to be run from nothing, and commits it."""
        path.mkdir(parents=True)
        listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True,
                                capture_output=True).stdout
        for name in listed.decode().split("\0"):
            source, target = ROOT / name, path / name
            if name and source.is_file() and not name.startswith(RERUN):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
                target.chmod(source.stat().st_mode)
        if (ROOT / DOWNLOADS).is_dir():
            (path / DOWNLOADS).parent.mkdir(exist_ok=True)
            (path / DOWNLOADS).symlink_to(ROOT / DOWNLOADS)
        clone = cls(path)
        clone.run("git init --quiet")
        clone.commit("copy")
        return clone

    @property
    def environment(self) -> dict[str, str]:
        """This Python's own environment first on the path: copies install nothing."""
        here = Path(sys.prefix)
        return {**os.environ, "VENV": str(here), "PATH": f"{here / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
                "PYTHONDONTWRITEBYTECODE": "1"}

    def run(self, command: str, *, ok: bool = True, timeout: float = 1800) -> str:
        """Runs a shell command in the copy; returns what it printed, stderr included.

        Args:
            command: as a person would type it.
            ok: whether it must succeed; False: it must fail.
            timeout: seconds; long, because nobody knows how slow or busy the machine is.
        """
        done = subprocess.run(command, shell=True, cwd=self.path, env=self.environment, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert (done.returncode == 0) == ok, f"{command}: exit status {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, command: list[str]) -> subprocess.Popen:
        """Starts a command in the background, in a process group of its own."""
        return subprocess.Popen(command, cwd=self.path, env=self.environment, text=True, start_new_session=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def commit(self, message: str) -> None:
        self.run("git add --all && git -c user.name=test -c user.email=test@example.org commit --quiet --allow-empty "
                 f"--message '{message}'")

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    def write(self, name: str, text: str) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def replace(self, name: str, old: str, new: str) -> None:
        """Replaces the one occurrence of ``old`` in a file."""
        text = self.read(name)
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        self.write(name, text.replace(old, new))

    def set_params(self, **changes) -> None:
        """Changes params.yaml: ``set_params(**{"finetune.epochs": 3})``."""
        params = yaml.safe_load(self.read("params.yaml"))
        for key, value in changes.items():
            *sections, last = key.split(".")
            place = params
            for section in sections:
                place = place[section]
            place[last] = value
        self.write("params.yaml", yaml.safe_dump(params, sort_keys=False))

    def locked(self) -> dict[str, dict]:
        """The stages of dvc.lock."""
        return yaml.safe_load(self.read("dvc.lock"))["stages"]

    def outputs(self, stage: str) -> dict[str, str]:
        """Digest of every output of a stage, as dvc.lock has it."""
        return {out["path"]: out["md5"] for out in self.locked()[stage]["outs"]}

    def stale(self) -> set[str]:
        """The stages that DVC would run."""
        with chdir(self.path):
            return set(_graph.read().pending)


@contextmanager
def chdir(path: Path) -> Iterator[None]:
    """Works in another folder for a while (contextlib has this from Python 3.11 on)."""
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)

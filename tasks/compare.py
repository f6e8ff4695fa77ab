"""Compares two revisions or DVC experiments, paired by seed: ``python tasks/compare.py A B``.

A and B are what Git or ``dvc exp show`` call them; ``workspace`` is what lies in the folder now. Prints what differs in
params.yaml and a table of all methods that both have, and keeps the table in ``comparisons/``. Nothing is checked out.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from _task import run
from hobs_rspar.errors import UserError
from hobs_rspar.evidence.comparison import Side, compared
from hobs_rspar.evidence.table_formats import Table, files, markdown_rows
from study import differences

WORKSPACE, FOLDER = "workspace", Path("comparisons")
LONGEST = 12  # changed keys that are printed


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("say what to compare: make compare A=HEAD~1 B=workspace. A and B are Git revisions, names of "
                        "experiments ('dvc exp show' lists them), or workspace")
    first, second = (side(name) for name in sys.argv[1:])
    table = compared(first, second)
    show(differences(first.params, second.params), table)
    folder = FOLDER / "_".join(name.replace("/", "-") for name in sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files(table).items():
        (folder / name).write_text(text)
    print(f"{folder}/comparison.md, .csv and .tex")


def side(name: str) -> Side:
    """Params, cells and timings of a revision, or of the workspace."""
    read = Workspace() if name == WORKSPACE else Revision(name)
    params = yaml.safe_load(read.text("params.yaml"))
    report = f"reports/{params['study']['name']}"
    cells = {Path(path).stem: json.loads(text) for path, text in read.under(f"{report}/cells")}
    timings: dict[str, dict[str, dict]] = {}
    for path, text in read.under(f"{report}/platforms"):
        timings.setdefault(Path(path).parent.name, {})[Path(path).stem] = json.loads(text)
    return Side(name, params, cells, timings)


class Workspace:
    """Files as they lie in the folder."""

    def text(self, path: str) -> str:
        return Path(path).read_text()

    def under(self, folder: str) -> Iterable[tuple[str, str]]:
        """(path, text) of all JSON files below a folder."""
        return [(str(path), path.read_text()) for path in sorted(Path(folder).rglob("*.json"))]


class Revision:
    """Files of a commit, read by Git.

    Raises:
        UserError: there is no such revision, experiment, or file in it.
    """

    def __init__(self, name: str):
        self.name = name
        experiments = git("for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
        named = [ref for ref in experiments if ref.rpartition("/")[2] == name]
        found = git("rev-parse", "--verify", "--quiet", f"{(named or [name])[0]}^{{commit}}")
        if found.returncode:
            raise UserError(f"'{name}' is neither a Git revision nor a DVC experiment of this repository; 'git log "
                            "--oneline' and 'dvc exp list' show their names")
        self.commit = found.stdout.strip()

    def text(self, path: str) -> str:
        shown = git("show", f"{self.commit}:{path}")
        if shown.returncode:
            raise UserError(f"{self.name} has no {path}: {shown.stderr.strip()}")
        return shown.stdout

    def under(self, folder: str) -> Iterable[tuple[str, str]]:
        """(path, text) of all JSON files below a folder."""
        paths = git("ls-tree", "-r", "--name-only", self.commit, f"{folder}/").stdout.split("\n")
        return [(path, self.text(path)) for path in paths if path.endswith(".json")]


def git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], capture_output=True, text=True)


def show(changed: dict, table: Table) -> None:
    print("\n".join(f"{key}: {one} -> {two}" for key, (one, two) in list(changed.items())[:LONGEST])
          or "params.yaml is the same in both")
    if len(changed) > LONGEST:
        print(f"… and {len(changed) - LONGEST} more; 'dvc params diff' shows all")
    print(f"\n{markdown_rows(table)}\n{table.note}")


if __name__ == "__main__":
    run(main)

"""Results of the experiments in benchmarks/: one JSON file each, checked when written and when read. Imports no torch.

A file belongs to a claim and says its number, interval and verdict, or why there is none; without a claim's number it
only adds tables to the report. Claims C4 to C7 are judged from the cells.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field, FiniteFloat, ValidationError, model_validator

from hobs_rspar.config import Section
from hobs_rspar.errors import UserError

CLAIMS = ("C1", "C2", "C3", "C8")
REPORTS_OWN = ("T1", "T8", "T10", "T16", "claims", "recovery", "repair")  # names of the report's own tables


class ClaimTable(Section):
    """A table: ``columns`` are pairs of key and heading, a row has some of the keys; None is not measured."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    title: str
    note: str
    columns: Annotated[list[tuple[str, str]], Field(min_length=1)]
    rows: list[dict[str, str | bool | int | FiniteFloat | None]]

    @model_validator(mode="after")
    def a_name_of_its_own_and_known_keys(self) -> ClaimTable:
        if self.name in REPORTS_OWN:
            raise ValueError(f"'{self.name}' is a table of the report itself; choose another name")
        keys = {key for key, _ in self.columns}
        unknown = sorted({key for row in self.rows for key in row} - keys)
        if unknown:
            raise ValueError(f"rows have {', '.join(unknown)}, which is no column; columns: {', '.join(keys)}")
        return self


class ClaimFile(Section):
    """What an experiment found.

    Attributes:
        claim: one of ``CLAIMS``; a word in small letters or None where the file only adds tables.
        measured: the number in ``unit``, with ``lo`` and ``hi`` of its interval; None where not measured.
        holds: the verdict; None where there is none.
        reason: why there is no verdict; empty where there is one.
        conditions: how it was measured.
        seconds: wall time of the experiment.
    """

    claim: Annotated[str, Field(pattern=r"^(C[1238]|[a-z_]+)$")] | None
    measured: FiniteFloat | None
    lo: FiniteFloat | None
    hi: FiniteFloat | None
    unit: str
    holds: bool | None
    reason: str
    conditions: str
    seconds: Annotated[FiniteFloat, Field(ge=0)]
    tables: list[ClaimTable]

    @property
    def judged(self) -> bool:
        """Whether the file belongs to a claim."""
        return self.claim in CLAIMS

    @model_validator(mode="after")
    def a_verdict_or_a_reason(self) -> ClaimFile:
        if self.judged and (self.holds is None) is not bool(self.reason):
            raise ValueError("either 'holds' is true or false and 'reason' empty, or 'holds' is null and 'reason' says "
                             "why")
        if self.holds is not None and self.measured is None:
            raise ValueError("'holds' without 'measured': a verdict needs its number")
        return self


def write(path: Path | str, record: dict) -> None:
    """Checks a record and writes it as ``reports/<study>/claims/<experiment>.json``.

    Raises:
        UserError: a key is missing, unknown, or of the wrong type; a number is not finite; verdict and reason disagree.
    """
    path = Path(path)
    checked = _checked(path, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(checked.model_dump(mode="json"), indent=1) + "\n")


def read(folder: Path) -> dict[str, ClaimFile]:
    """The results that are there: experiment (the file's name) to its content.

    Raises:
        UserError: a file is no such record; two files judge the same claim or name a table alike.
    """
    found = {file.stem: _checked(file, _parsed(file)) for file in sorted(folder.glob("*.json"))}
    _check_unique(folder, "claim", {name: [record.claim] for name, record in found.items() if record.judged})
    _check_unique(folder, "table", {name: [table.name for table in record.tables] for name, record in found.items()})
    return found


def _parsed(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{file} is not valid JSON ({problem}); {_again(file)}") from None


def _checked(file: Path, record: dict) -> ClaimFile:
    try:
        return ClaimFile.model_validate(record)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the record"
        seen = "" if isinstance(first["input"], dict) else f" (seen: {first['input']!r})"
        raise UserError(f"{file}: {key}: {first['msg'].removeprefix('Value error, ')}{seen}; {_again(file)}") from None


def _again(file: Path) -> str:
    return f"correct benchmarks/{file.stem}.py, or delete the file, and run 'dvc repro claim@{file.stem}'"


def _check_unique(folder: Path, what: str, names: dict[str, list[str]]) -> None:
    owners: dict[str, str] = {}
    for file, own in names.items():
        for name in own:
            if name in owners:
                raise UserError(f"{folder}/{owners[name]}.json and {file}.json both have the {what} '{name}'; delete "
                                "the one that is left over, or rename it in its script")
            owners[name] = file

"""Accuracy against cost over several budgets: studies that differ in nothing but the budget, from their reports' files.

Such studies are called NAME and NAME_<percent>, like pareto and pareto_50.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from hobs_rspar.evidence.summary import THROUGHPUT_BATCH
from hobs_rspar.evidence.table_formats import Column, Table, files
from hobs_rspar.evidence.tables import in_words

FEWEST = 5  # operating points for a statement about a front
COLUMNS = (
    Column("method", "Method"),
    Column("budget", "Budget"),
    Column("n", "n"),
    Column("macs_ratio", "MACs kept", 5, 3),
    Column("top1", "Top-1 (%)", 4, 2),
    Column("top1_lo", "95 % from", 4, 2),
    Column("top1_hi", "to", 4, 2),
    Column("speedup", f"Speedup, batch {THROUGHPUT_BATCH}", 4, 2),
    Column("speedup_lo", "95 % from", 4, 2),
    Column("speedup_hi", "to", 4, 2),
    Column("front", "On the front"),
)
NUMBERS = ("macs_ratio", "top1", "top1_lo", "top1_hi", "speedup", "speedup_lo", "speedup_hi")


def update(folder: Path) -> None:
    """Writes the table and the figure of every family of studies with at least three budgets into ``folder``.

    The figure is drawn where the table's numbers are new: matplotlib takes longer to load than a run that does nothing.
    """
    for name, studies in families(folder).items():
        table = _table(name, studies, _rows(studies))
        figure, numbers, texts = folder / f"{table.name}.svg", folder / f"{table.name}.csv", files(table)
        if not (figure.is_file() and numbers.is_file() and numbers.read_text() == texts[numbers.name]):
            from hobs_rspar.evidence.front_figure import drawn

            for kind, data in drawn(table.rows).items():
                figure.with_suffix(f".{kind}").write_bytes(data)
        for file, text in texts.items():
            (folder / file).write_text(text)


def families(folder: Path) -> dict[str, list[Path]]:
    """Name to the folders of its studies, the largest budget first; three of them or more."""
    found: dict[str, list[Path]] = {}
    for study in sorted(folder.iterdir()):
        if (study / "tables" / "T1.csv").is_file() and "macs" in _cell(study)["budget"]:
            found.setdefault(re.sub(r"_\d+$", "", study.name), []).append(study)
    whole = {name: _alike(studies) for name, studies in found.items()}
    return {name: sorted(studies, key=lambda study: -_cell(study)["budget"]["macs"])
            for name, studies in whole.items() if len(studies) >= 3}


def on_the_front(rows: list[dict]) -> list[bool]:
    """Whether a row is timed, and no other is at least as fast and at least as accurate, and better in one of both."""
    points = [(row["speedup"], row["top1"]) for row in rows]
    timed = [point for point in points if point[0] is not None]
    return [point in timed and not any(speed >= point[0] and top1 >= point[1] and (speed, top1) != point
                                       for speed, top1 in timed) for point in points]


def _alike(studies: list[Path]) -> list[Path]:
    """Those with the network, data, recovery, precision, dense network, methods, seeds and platforms of the first."""
    def same(study: Path) -> list:
        cell, names = _cell(study), sorted(file.name for file in (study / "cells").glob("*.json"))
        shared = [cell.get(key) for key in ("network", "dataset", "dense", "precision")]
        return [*shared, cell["recovery_curve"][-1]["images"], names, _fingerprints(study)]
    return [study for study in studies if same(study) == same(studies[0])]


def _fingerprints(study: Path) -> dict[str, dict]:
    """Platform to what its timings depend on; all timings of a platform have the same (evidence/cells.py)."""
    return {file.parent.name: json.loads(file.read_text())["fingerprint"]
            for file in (study / "platforms").glob("*/*.json")}


def _cell(study: Path) -> dict:
    return json.loads(min((study / "cells").glob("*.json")).read_text())


def _rows(studies: list[Path]) -> list[dict]:
    """A row per method and budget, all methods' front marked."""
    rows = []
    for study in studies:
        budget, speeds = in_words(_cell(study)["budget"]), _speeds(study)
        for row in _read(study, "T1"):
            numbers = row | speeds.get(row["method"], {})
            rows.append({"method": row["method"], "budget": budget, "n": int(row["n"])} |
                        {key: float(numbers[key]) if numbers.get(key) else None for key in NUMBERS})
    rows = [row | {"front": "yes" if front else ""} for row, front in zip(rows, on_the_front(rows), strict=True)]
    order = list(dict.fromkeys(row["method"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["method"]))


def _speeds(study: Path) -> dict[str, dict]:
    """Method to its speedup with the interval, which T1 has no room for; empty where nothing was timed."""
    return {row["method"]: {key: row[key] for key in ("speedup", "speedup_lo", "speedup_hi")}
            for row in _read(study, "T6") if row["batch"] == THROUGHPUT_BATCH}


def _read(study: Path, table: str) -> list[dict]:
    file = study / "tables" / f"{table}.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []


def _table(name: str, studies: list[Path], rows: list[dict]) -> Table:
    cell, count = _cell(studies[0]), len(studies)
    enough = (f"The front has {count} operating points a method." if count >= FEWEST else
              f"{count} operating points a method are too few to speak of a front; {FEWEST} would do.")
    names, images = ", ".join(study.name for study in studies), cell["recovery_curve"][-1]["images"]
    note = (f"Studies {names}: one dense network, the same methods, seeds and recovery ({images:,} images). Top-1 on "
            "the test set, mean over seeds with its t interval; speedup: dense time / pruned time, median over cells, "
            "its interval by bootstrap over cells. "
            f"On the front: no other method and budget is at least as fast and as accurate, by the means. {enough} "
            "Conditions: each study's own T1.")
    return Table(f"{name}_front", f"Accuracy against cost: {cell['network']} on {cell['dataset']}", note, COLUMNS, rows)

"""All studies of the checkout in one table: networks, data sets, budgets, recoveries, from the reports' own files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from hobs_rspar.evidence.pairing import OURS, REFERENCE
from hobs_rspar.evidence.summary import FAMILY, THROUGHPUT_BATCH
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import in_words

COLUMNS = (
    Column("study", "Study"),
    Column("network", "Network"),
    Column("dataset", "Data"),
    Column("budget", "Budget"),
    Column("images", "Images of recovery"),
    Column("n", "n"),
    Column("reference", f"{REFERENCE} (%)", 4, 2),
    Column("rival", "Best rival"),
    Column("rival_top1", "Best rival (%)", 4, 2),
    Column("top1", f"{OURS} (%)", 4, 2),
    Column("top1_lo", "95 % from", 4, 2),
    Column("top1_hi", "to", 4, 2),
    Column("lead", "Lead (points)", 4, 2),
    Column("p_adjusted", "Adjusted p", 6, 3),
    Column("speedup", f"Speedup, batch {THROUGHPUT_BATCH}", 4, 2),
)
NOTE = (f"One row per study in reports/ that has {OURS}: test top-1, means over seeds. Best rival: the method with the "
        "highest mean among those that do not use H-OBS; adjusted p: of the paired t-test against it, as in that "
        "study's T1. Studies differ in more than one condition; each one's page says which.")


def across(folder: Path) -> Table | None:
    """A row per study with a report; None where there is none."""
    rows = [row for study in sorted(folder.iterdir()) if (study / "tables" / "T1.csv").is_file()
            and (row := _row(study))]
    return Table("studies", "All studies", NOTE, COLUMNS, rows) if rows else None


def _row(folder: Path) -> dict | None:
    methods = {row["method"]: row for row in csv.DictReader((folder / "tables" / "T1.csv").read_text().splitlines())}
    cells = sorted((folder / "cells").glob(f"{OURS}-*.json"))
    if OURS not in methods or not cells:
        return None
    ours, cell = methods[OURS], json.loads(cells[0].read_text())
    row = {"study": folder.name, "network": cell["network"], "dataset": cell["dataset"],
           "budget": in_words(cell["budget"]), "images": cell["recovery_curve"][-1]["images"], "n": int(ours["n"])}
    row |= {key: _number(ours[key]) for key in ("top1", "top1_lo", "top1_hi", "speedup")}
    if REFERENCE in methods:
        row["reference"] = _number(methods[REFERENCE]["top1"])
    rivals = [name for name in methods if name != REFERENCE and not name.startswith(FAMILY)]
    if not rivals:
        return row
    best = max(rivals, key=lambda name: float(methods[name]["top1"]))
    top1 = float(methods[best]["top1"])
    return row | {"rival": best, "rival_top1": top1, "lead": row["top1"] - top1,
                  "p_adjusted": _number(methods[best]["p_adjusted"])}


def _number(text: str) -> float | None:
    return float(text) if text else None

"""Result tables of README.md, each generated between two markers from the tables of the study that they name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from hobs_rspar.errors import UserError
from hobs_rspar.evidence.summary import LATENCY_BATCH, REFERENCE, THROUGHPUT_BATCH
from hobs_rspar.evidence.table_formats import Column, Table, markdown_rows

PAGE_IN_GIT = "default"  # of the other studies Git has records and tables
COLUMNS = (
    Column("method", "Method"),
    Column("top1", "Top-1 (%)", right=True),
    Column("macs_ratio", "MACs", right=True),
    Column("params_ratio", "Parameters", right=True),
    Column("latency_ms", f"Latency, batch {LATENCY_BATCH} (ms)", 2),
    Column("speedup", f"Speedup, batch {THROUGHPUT_BATCH}", right=True),
    Column("delta_vs_dense", f"Difference to {REFERENCE} (points)", 2),
    Column("p_adjusted", "Adjusted p", 3),
)


def markers(study: str) -> tuple[str, str]:
    """The lines between which the README shows a study's results."""
    return f"<!-- {study}:begin -->", f"<!-- {study}:end -->"


def render(report_folder: str | Path) -> str:
    """The block between the markers, markers included, from ``tables/T1.csv`` and ``tables/conditions.json``.

    Raises:
        UserError: the report has not been written.
    """
    folder = Path(report_folder)
    try:
        rows = list(csv.DictReader((folder / "tables" / "T1.csv").read_text().splitlines()))
        seen = json.loads((folder / "tables" / "conditions.json").read_text())
    except FileNotFoundError as missing:
        raise UserError(f"{missing.filename} not found; 'python pipeline/report.py' writes it") from None
    table = markdown_rows(Table("README", "", "", COLUMNS, [_row(row) for row in rows]))
    where, (begin, end) = f"{folder.parent.name}/{folder.name}", markers(folder.name)
    link = f"All tables and figures: [{where}/index.html]({where}/index.html)" if folder.name == PAGE_IN_GIT else \
        f"All tables: [{where}/tables]({where}/tables); `make report STUDY={folder.name}` draws the page"
    return (f"{begin}\n{table}\n{seen['line']} ± is half of the {seen['confidence']} interval over seeds. "
            f"{link}.\n{end}")


def update(readme_path: str | Path, report_folder: str | Path) -> bool:
    """Rewrites a study's block of the README, if it has one; returns whether anything changed.

    Raises:
        UserError: the README has one of the markers without the other, or the report has not been written.
    """
    path, (begin, end) = Path(readme_path), markers(Path(report_folder).name)
    text = path.read_text()
    if begin not in text and end not in text:
        return False
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{path} must hold the lines '{begin}' and '{end}' once each, in this order; the result table "
                        "is written between them")
    wanted = text[:text.index(begin)] + render(report_folder) + text[text.index(end) + len(end):]
    path.write_text(wanted)
    return wanted != text


def _row(row: dict[str, str]) -> dict:
    values = {key: float(row[key]) if row[key] else None for key in row if key != "method"}
    return {"method": row["method"], "top1": _plus_minus(values), "macs_ratio": _times(values["macs_ratio"]),
            "params_ratio": _times(values["params_ratio"]), "latency_ms": values["latency_ms"],
            "speedup": _times(values["speedup"]), "delta_vs_dense": values["delta_vs_dense"],
            "p_adjusted": values["p_adjusted"]}


def _plus_minus(values: dict) -> str:
    if values["top1_hi"] is None:
        return f"{values['top1']:.2f}"
    return f"{values['top1']:.2f} ± {values['top1_hi'] - values['top1']:.2f}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x"

"""What every experiment shares: this checkout's package on the path, and one way to show and keep what was found."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))

from _stage import run  # noqa: E402  (the line above makes it importable; it makes the package importable)
from hobs_rspar import config  # noqa: E402
from hobs_rspar.evidence import claim_files  # noqa: E402
from hobs_rspar.evidence.table_formats import Column, Table, markdown_rows  # noqa: E402
from hobs_rspar.paths import Paths  # noqa: E402

__all__ = ["publish", "run"]


def publish(params: config.Params, record: dict) -> None:
    """Writes the record as ``reports/<study>/claims/<experiment>.json``; prints its tables and its verdict."""
    path = Paths.of(params.study).claims / f"{Path(sys.argv[0]).stem}.json"
    claim_files.write(path, record)
    for table in record["tables"]:
        columns = tuple(Column(key, heading) for key, heading in table["columns"])
        rows = [{key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
                for row in table["rows"]]
        shown = markdown_rows(Table(table["name"], table["title"], table["note"], columns, rows))
        print(f"{table['title']}\n\n{shown}\n{table['note']}\n")
    print(f"{verdict(record)}{record['conditions']}; {record['seconds']} s -> {path}")


def verdict(record: dict) -> str:
    """The claim's number, interval and verdict in words; empty where the experiment only adds tables."""
    if record["claim"] is None:
        return ""
    return (f"{record['claim']}: {record['measured']:.4g} {record['unit']} ({record['lo']:.4g} to {record['hi']:.4g}), "
            f"{'holds' if record['holds'] else 'does not hold'}; ")

"""What the latency table foretold, and what was measured: of the networks it was fitted to, and of the study's own."""

from __future__ import annotations

import statistics as plain

import numpy as np

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.pairing import REFERENCE
from hobs_rspar.evidence.summary import Summary, speed_interval
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject
from hobs_rspar.hardware.latency_table import LatencyTable

COLUMNS = (
    Column("what", "Networks"),
    Column("n", "n"),
    Column("foretold", "Latency foretold (x dense)", 4, 3),
    Column("measured", "measured (x dense)", 4, 3),
    Column("measured_lo", "95 % from", 4, 3),
    Column("measured_hi", "to", 4, 3),
    Column("off", "Off by (%)", 2, 1),
)


def foretold(evidence: Evidence, summary: Summary) -> Table | None:
    """A row for the networks that were left out of the fit, and one per method; None where the budget is MACs."""
    if not (evidence.latency and evidence.latency["measured"]):
        return None
    table = LatencyTable.from_json(evidence.latency)
    off = sorted(100 * table.errors())
    rows = [{"what": "random widths, each left out of the fit", "n": len(off), "off": plain.median(off)}]
    rows += [_row(evidence, method, table) for method in summary.methods if method != REFERENCE]
    note = (f"The table: {len(table.layers)} layers alone at eighths of their widths, and {len(off)} whole networks, "
            f"at batch {table.batch_size} on {table.platform}. Off by: median of |foretold / measured - 1|; at worst "
            f"{off[-1]:.1f} % among the networks left out. Methods: foretold is the budget, which every plan meets by "
            f"the table; measured is 1 / speedup at batch {table.batch_size}, median over cells with bootstrap "
            f"interval. {conditions(evidence)}.")
    return Table("latency", f"Latency foretold and measured: {subject(evidence)}, {summary.n}", note, COLUMNS, rows)


def _row(evidence: Evidence, method: str, table: LatencyTable) -> dict:
    row = {"what": method, "n": len(evidence.of(method)), "foretold": _budget(evidence, table)}
    speed = speed_interval(evidence, evidence.timed(method), str(table.batch_size))
    if speed is None:
        return row
    row |= {"measured": 1 / speed.value, "off": 100 * abs(row["foretold"] * speed.value - 1)}
    return row if speed.lo is None else row | {"measured_lo": 1 / speed.hi, "measured_hi": 1 / speed.lo}


def _budget(evidence: Evidence, table: LatencyTable) -> float:
    """As a fraction of the dense network's latency, which the table foretells, too."""
    given, dense = evidence.params.study.budget, table.wholes[0]
    if given.latency_ratio is not None:
        return given.latency_ratio
    return given.latency_ms / float(table.network_ms(np.array(dense.inputs), np.array(dense.outputs)))

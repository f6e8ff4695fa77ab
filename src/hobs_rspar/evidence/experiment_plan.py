"""Which table of the published experiment plan is where, and why one is not here."""

from __future__ import annotations

from collections.abc import Collection

from hobs_rspar.evidence.table_formats import Column, Table

HERE = "in this report"
# Table -> what it shows, and why a study may not have it (empty: every study has).
PLAN = {
    "T1": ("system-level performance", ""),
    "T2": ("a second network", "a study has one network; reports/studies.md has them all"),
    "T3": ("a third network", "a study has one network; reports/studies.md has them all"),
    "T4": ("a fourth network", "a study has one network; reports/studies.md has them all"),
    "T5": ("platforms", "not measured: nothing is timed yet"),
    "T6": ("batch sizes; T6_modes: formats, folded batch norms, compiled", "not measured: nothing is timed yet"),
    "T7": ("clocks and energy", "not measured: clocks are recorded, never set"),
    "T8": ("parts of the method, left out one by one", "this study has none of the variants; the study ablation has"),
    "T9": ("criteria compared", "not measured: there is no result of its experiment, sensitivity"),
    "T10": ("allocators compared", ""),
    "T11": ("fixed λ against λ(t)", "not measured: there is no result of its experiment, penalty"),
    "T12": ("stability over seeds", ""),
    "T13": ("cost of every component", ""),
    "T14": ("time per operator, against the machine's ceilings",
            "not measured: no cell of speed.cells has been timed; the study hardware has some"),
    "T15": ("TensorRT", "not measured: it needs an NVIDIA GPU and TensorRT; ONNX Runtime is measured by the stage "
                        "export"),
    "T16": ("single runs and their spread", ""),
}
COLUMNS = (Column("table", "Table"), Column("shows", "Shows", wrap=0.35), Column("where", "Where", wrap=0.5))


def where(shown: Collection[str]) -> Table:
    """A row per table of the plan.

    Args:
        shown: names of the tables that the report has.
    """
    rows = [{"table": name, "shows": what, "where": HERE if name in shown else reason or "not in this report"}
            for name, (what, reason) in PLAN.items()]
    return Table("plan", "Tables of the published experiment plan", "Their names are the plan's.", COLUMNS, rows)

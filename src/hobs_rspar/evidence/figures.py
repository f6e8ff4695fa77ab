"""The figures of the report: drawn once, saved as SVG and PNG with their data beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import matplotlib

from hobs_rspar.evidence import outcome_figures, process_figures, recovery_figures, roofline_figure
from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import STYLE, Drawing, file_bytes
from hobs_rspar.evidence.interactive import Charts
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.table_formats import csv_text

Draw = Callable[[Evidence, Summary], Drawing | str]
FIGURES: tuple[tuple[str, str, Draw], ...] = (
    ("recovery_budget", "Accuracy against the recovery budget", recovery_figures.recovery_budget),
    ("accuracy_macs", "Accuracy against MACs", outcome_figures.accuracy_macs),
    ("accuracy_latency", "Accuracy against latency", outcome_figures.accuracy_latency),
    ("paired_differences", "Paired differences", outcome_figures.paired_differences),
    ("critical_differences", "Average ranks", outcome_figures.critical_differences),
    ("recovery_curves", "Recovery curves", recovery_figures.recovery_curves),
    ("allocation", "Allocation per group", process_figures.allocation),
    ("sensitivity", "Sensitivity of every channel", process_figures.sensitivity),
    ("reconstruction", "Reconstruction of the feature maps", process_figures.reconstruction),
    ("reward_curve", "Reward of the search", process_figures.reward_curve),
    ("lambda_curve", "λ(t) and the expected accuracy drop", process_figures.lambda_curve),
    ("roofline", "Convolutions under the roofline", roofline_figure.roofline),
    ("measured_plans", "Plans measured by the search", process_figures.measured_plans),
)


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report.

    Attributes:
        name: file name without extension.
        caption: how to read it; where nothing is drawn, why.
        drawn: the rest of the caption, which is true of the drawing, but not of ``chart``.
        n: what it is a mean of, such as ``n = 5 seeds``; empty where nothing is drawn.
        files: extension (``svg``, ``png``, ``csv``) to content; empty where nothing is drawn.
        chart: the same to hover over, a Vega-Lite specification; None where there is none.
    """

    name: str
    title: str
    caption: str
    n: str
    files: dict[str, bytes]
    chart: dict | None = None
    drawn: str = ""


def draw_all(evidence: Evidence, summary: Summary) -> list[ReportFigure]:
    """Every figure in the page's order."""
    charts = Charts(evidence)
    return [_draw(name, title, draw, evidence, summary, charts) for name, title, draw in FIGURES]


def _draw(name: str, title: str, draw: Draw, evidence: Evidence, summary: Summary, charts: Charts) -> ReportFigure:
    with matplotlib.rc_context(STYLE):
        drawing = draw(evidence, summary)
    if isinstance(drawing, str):
        return ReportFigure(name, title, f"Not drawn: {drawing}.", "", {})
    rows = [[float(f"{value:.7g}") if isinstance(value, float) else value for value in row] for row in drawing.rows]
    data = csv_text(drawing.header, rows).encode()
    return ReportFigure(name, title, drawing.caption, drawing.n, file_bytes(drawing.figure) | {"csv": data},
                        charts.of(name, drawing.header, rows), drawing.drawn)

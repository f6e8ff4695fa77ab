"""The roofline: every convolution before and after pruning, against the machine's ceilings."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, legend_below, method_looks, new_figure
from hobs_rspar.evidence.pairing import REFERENCE
from hobs_rspar.evidence.speed import t14_layers
from hobs_rspar.evidence.summary import Summary

HEADER = ["network", "layer", "intensity", "gmacs", "roof"]
ONE_RUN = "n = 1 network each"


def roofline(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Arithmetic against MACs per byte, one point per convolution."""
    table = t14_layers(evidence)
    if table is None:
        return "no operator of this study's networks has been timed; speed.cells in params.yaml names those to time"
    rows = [[row[key] for key in HEADER] for row in table.rows]
    figure, (axis,) = new_figure(3.0)
    looks = method_looks(evidence.methods)
    for network in dict.fromkeys(row[0] for row in rows):
        look = looks.get(REFERENCE if network == "dense" else network, {"color": "#8c8c8c", "marker": "o"})
        points = [row for row in rows if row[0] == network]
        axis.plot([row[2] for row in points], [row[3] for row in points], linestyle="none", alpha=0.8, label=network,
                  **look)
    axis.plot(*zip(*line([(row[2], row[4]) for row in rows])), color="#444444", linewidth=1, label="roofline")
    axis.set(xscale="log", yscale="log", xlabel="Multiply-accumulates per byte", ylabel="GMAC/s",
             title=f"Convolutions under the roofline ({ONE_RUN})")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter("{x:g}")
        side.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "235" else "")
    axis.tick_params(which="minor", labelsize=6.5)
    legend_below(figure, [axis])
    return Drawing(figure, HEADER, rows, "One point per convolution. The line is what the machine can do at so many "
                   "multiply-accumulates per byte moved, as measured beside them; a point above it found its data in a "
                   "cache. Left of the bend, moving data limits; right of it, arithmetic.", ONE_RUN)


def line(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the roofline on which the points (MACs per byte, MACs/s) lie, its bend among them."""
    (first, low), (last, high) = min(points), max(points)
    bend = first * high / low  # bandwidth limits the first of them, or nothing does
    return sorted({(first, low), (min(max(bend, first), last), high), (last, high)})

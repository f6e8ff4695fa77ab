"""The figure of several budgets: accuracy against kept MACs and against the measured speedup."""

from __future__ import annotations

import matplotlib
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from hobs_rspar.evidence.figure_style import STYLE, file_bytes, legend_below, method_looks, new_figure
from hobs_rspar.evidence.summary import THROUGHPUT_BATCH

COSTS = {"macs_ratio": "Kept fraction of the dense network's MACs",
         "speedup": f"Speedup at batch {THROUGHPUT_BATCH}, dense time / pruned time"}
LEAST = 0.01  # percent of errors that the axis can show: one image of 10,000


def drawn(rows: list[dict]) -> dict[str, bytes]:
    """The figure as ``svg`` and ``png``.

    Args:
        rows: of the table of a front, one per method and budget.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(5.2, 2)
        for axis, (cost, label) in zip(axes, COSTS.items(), strict=True):
            _panel(axis, rows, cost)
            axis.set(xlabel=label, ylabel="Top-1 error, test (%)")
        axes[0].set_title(f"Accuracy against cost (n = {min(row['n'] for row in rows)} seeds)")
        legend_below(figure, axes)
        return file_bytes(figure)


def _panel(axis, rows: list[dict], cost: str) -> None:
    """One line per method; the lowest error on top, and logarithmic, because it doubles where little is kept.

    The means set the axis: an interval of few seeds may be wide.
    """
    for method, look in method_looks(list(dict.fromkeys(row["method"] for row in rows))).items():
        points = [row for row in rows if row["method"] == method and row[cost] is not None]
        costs, errors = [row[cost] for row in points], [100 - row["top1"] for row in points]
        axis.errorbar(costs, errors, xerr=_arms(points, cost), yerr=_arms(points, "top1")[::-1], capsize=1.5,
                      elinewidth=0.7, linewidth=0.9, label=method, **look)
    every = [max(100 - row["top1"], LEAST) for row in rows]
    axis.set_yscale("log", nonpositive="clip")
    axis.set_ylim(1.08 * max(every), 0.93 * min(every))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _arms(rows: list[dict], key: str) -> list[list[float]]:
    """Lengths of the intervals' lower and upper sides; none where there is no interval."""
    ends = [(row.get(f"{key}_lo"), row[key], row.get(f"{key}_hi")) for row in rows]
    return [[0.0 if lo is None else mean - lo for lo, mean, _ in ends],
            [0.0 if hi is None else hi - mean for _, mean, hi in ends]]

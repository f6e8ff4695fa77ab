"""Figures of recovery: validation error along it, and test error after recoveries of several lengths."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, legend_below, method_looks, new_figure
from hobs_rspar.evidence.metrics import mean_recovery
from hobs_rspar.evidence.pairing import OURS
from hobs_rspar.evidence.recovery import Budget
from hobs_rspar.evidence.summary import Summary

SMALLEST_ERROR = 0.05  # percent; a logarithmic axis has no zero


def recovery_budget(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Test error after every length of recovery, from none to the study's own."""
    budgets = summary.recovery
    if len(budgets) < 2:
        return "the cells have measured a single length of recovery"
    figure, (axis,) = new_figure(3.3)
    for name, look in method_looks(evidence.methods).items():
        _curve(axis, budgets, name, look)
    _error_axis(axis, "Test error (%), log scale")
    axis.set_xticks(range(len(budgets)), [f"{budget.images:,}" for budget in budgets])
    axis.margins(x=0.08)  # the last label is long
    axis.set(xlabel="Images of recovery (not to scale)", title=f"Accuracy against the recovery budget ({summary.n})")
    legend_below(figure, [axis])
    rows = [[name, budget.images, budget.seen, len(budget.top1[name]), accuracy.value, accuracy.lo, accuracy.hi]
            for budget in budgets for name, accuracy in budget.accuracy.items()]
    confidence = f"{100 * evidence.params.report.confidence:g} %"
    return Drawing(figure, ["method", "images", "seen", "n", "top1", "top1_lo", "top1_hi"], rows,
                   f"Mean over seeds; band: its {confidence} t interval. Every point is the end of a recovery of its "
                   "own, 0 the network as repair left it. Error = 100 − top-1; lower is better.", summary.n)


def recovery_curves(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Validation error during recovery; logarithmic, so that start and end can both be read."""
    curves = {name: mean_recovery(evidence, name) for name in evidence.methods}
    if max(len(images) for images, _ in curves.values()) < 2:
        return "no cell has a recovery history"
    figure, (axis,) = new_figure(3.0)
    for name, look in method_looks(evidence.methods).items():
        images, accuracy = curves[name]
        axis.plot([count / 1000 for count in images], [100 - value for value in accuracy], label=name,
                  linewidth=_width(name), **look)
    _error_axis(axis, "Validation error (%), log scale")
    axis.set(xlabel="Images of recovery (thousands)", title=f"Recovery ({summary.n})")
    legend_below(figure, [axis])
    rows = [[name, round(count), value] for name, (images, accuracy) in curves.items()
            for count, value in zip(images, accuracy, strict=True)]
    return Drawing(figure, ["method", "images", "validation_top1"], rows,
                   "Mean over seeds; the first point is after repair and before the first step. Error = 100 − top-1.",
                   summary.n)


def _curve(axis, budgets: list[Budget], method: str, look: dict) -> None:
    places = [place for place, budget in enumerate(budgets) if method in budget.accuracy]
    found = [budgets[place].accuracy[method] for place in places]
    axis.plot(places, [100 - accuracy.value for accuracy in found], label=method, linewidth=_width(method),
              zorder=3 if method == OURS else 2, **look)
    if all(accuracy.lo is not None for accuracy in found):
        lower, upper = ([max(SMALLEST_ERROR, 100 - end) for end in ends]
                        for ends in zip(*((accuracy.hi, accuracy.lo) for accuracy in found)))
        axis.fill_between(places, lower, upper, color=look["color"], alpha=0.18, linewidth=0)


def _error_axis(axis, label: str) -> None:
    axis.set(yscale="log", ylabel=label)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in "2357" else "")
    axis.tick_params(axis="y", which="minor", labelsize=6.5)


def _width(method: str) -> float:
    return 2.0 if method == OURS else 1.1

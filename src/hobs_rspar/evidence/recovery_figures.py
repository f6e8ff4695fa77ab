"""Figures of recovery: validation error along it, and test error after recoveries of several lengths."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, legend_below, method_looks, new_figure
from hobs_rspar.evidence.metrics import mean_recovery
from hobs_rspar.evidence.pairing import OURS
from hobs_rspar.evidence.recovery import Budget
from hobs_rspar.evidence.summary import Summary

SMALLEST_ERROR = 0.05  # percent; a logarithmic axis has no zero
NARROW = 5  # of an axis that has room for all of its ticks' numbers: upper over lower end
ROOM = 2.5  # the axis ends at so many times the largest error at the end: what is above would press the rest together


def recovery_budget(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Test error after every length of recovery, from none to the study's own."""
    budgets = summary.recovery
    if len(budgets) < 2:
        return "the cells have measured a single length of recovery"
    figure, (axis,) = new_figure(3.3)
    for name, look in method_looks(evidence.methods).items():
        _curve(axis, budgets, name, look)
    _error_axis(axis, "Test error (%), log scale",
                {name: [100 - budget.accuracy[name].value for budget in budgets if name in budget.accuracy]
                 for name in evidence.methods})
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
    _error_axis(axis, "Validation error (%), log scale",
                {name: [100 - value for value in accuracy] for name, (_, accuracy) in curves.items()})
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


def _error_axis(axis, label: str, errors: dict[str, list[float]]) -> None:
    """A logarithmic axis; errors that are far above all final ones are named at its upper end instead of drawn.

    Args:
        axis: of a figure; changed in place.
        label: of the axis.
        errors: method to its errors in percent, the one after the longest recovery last.
    """
    axis.set(yscale="log", ylabel=label)
    top = ROOM * max(max(curve[-1] for curve in errors.values()), SMALLEST_ERROR)
    beyond = {name: max(curve) for name, curve in errors.items() if max(curve) > top}
    if beyond:
        axis.set_ylim(top=top)
        who = next(iter(beyond)) if len(beyond) == 1 else f"{len(beyond)} methods"
        ends = sorted({f"{value:.0f}" for value in (min(beyond.values()), max(beyond.values()))})
        axis.annotate(f"off the scale: {who}, up to {ends[-1]} %" if len(ends) > 1 else
                      f"off the scale: {who}, {ends[0]} %", (0.99, 0.985), xycoords="axes fraction", ha="right",
                      va="top", fontsize=6.5, bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1})
    axis.yaxis.set_major_formatter("{x:g}")
    low, high = axis.get_ylim()
    named = "23456789" if high / low < NARROW else "2357"
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if str(value)[0] in named else "")
    axis.tick_params(axis="y", which="minor", labelsize=6.5)


def _width(method: str) -> float:
    return 2.0 if method == OURS else 1.1

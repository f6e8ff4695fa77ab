"""Figures of what came out: accuracy against cost, differences between methods."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, legend_below, method_looks, new_figure, new_panels
from hobs_rspar.evidence.ranks import ranked
from hobs_rspar.evidence.statistics import Difference, Interval
from hobs_rspar.evidence.summary import LATENCY_BATCH, OURS, REFERENCE, MethodSummary, Summary

CLOSEST = 0.0004  # kept fraction of the MACs; points at equal costs are set this far apart


def accuracy_macs(evidence: Evidence, summary: Summary) -> Drawing:
    """Test accuracy against kept MACs."""
    costs = {name: method.macs_ratio for name, method in summary.methods.items()}
    panels = clusters(costs, 0.05)
    places = {name: place for panel in panels for name, place in apart(costs, panel).items()}
    figure = _against(evidence, summary, panels, {name: Interval(place, None, None) for name, place in places.items()},
                      "Kept fraction of the dense network's MACs", f"Accuracy against MACs ({summary.n})")
    rows = [[name, method.n, method.macs_ratio, *_triple(method.accuracy)] for name, method in summary.methods.items()]
    moved = max(abs(places[name] - costs[name]) for name in costs)
    aside = f" Points are moved by up to {moved:.4f} so that none hides another." if moved else ""
    return Drawing(figure, ["method", "n", "macs_ratio", "top1", "top1_lo", "top1_hi"], rows,
                   "Mean over seeds with its t interval.", summary.n,
                   f"{_broken(panels)}{aside}".strip())


def accuracy_latency(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Test accuracy against latency at batch 1, intervals in both directions."""
    timed = {name: method.latency for name, method in summary.methods.items() if method.latency}
    if not timed:
        return (f"no cell has a timing at batch {LATENCY_BATCH} on "
                f"{evidence.platform or 'any platform'}; the benchmark stage measures it")
    costs = {name: latency.value for name, latency in timed.items()}
    panels = clusters(costs, 0.25 * (max(costs.values()) - min(costs.values())))
    figure = _against(evidence, summary, panels, timed, f"Latency at batch {LATENCY_BATCH}, p50 (ms)",
                      f"Accuracy against latency ({summary.n})")
    rows = [[name, summary.methods[name].n, *_triple(latency), *_triple(summary.methods[name].accuracy)]
            for name, latency in timed.items()]
    header = ["method", "n", "latency_ms", "latency_lo", "latency_hi", "top1", "top1_lo", "top1_hi"]
    return Drawing(figure, header, rows, "Horizontal: median over cells with its bootstrap interval, platform "
                   f"{evidence.platform}. Vertical: mean over seeds with its t interval.", summary.n,
                   _broken(panels))


def paired_differences(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Forest plot of ``hobs_rspar - rival``, paired by seed."""
    rows = _forest_rows(summary)
    if not rows:
        return f"{OURS} shares two seeds with no other method of this study; 2 seeds would do"
    figure, (axis,) = new_figure(0.9 + 0.26 * len(rows))
    looks = method_looks(evidence.methods)
    for place, (name, difference) in enumerate(rows):
        _forest_row(axis, place, summary, name, difference, looks[name])
    axis.axvline(0, color="#444444", linewidth=0.8, zorder=1)
    if rows[0][0] == REFERENCE:
        axis.plot([-evidence.params.study.margin_points] * 2, [-0.35, 0.35], color="#444444", linewidth=1,
                  linestyle=":")
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(xlabel=f"{OURS} − rival, top-1 on the test set (points)", ylim=(len(rows) - 0.4, -0.6),
             title=f"Paired differences ({summary.n})")
    axis.grid(visible=False, axis="y")
    data = [[name, difference.n, *_triple(difference.interval), difference.bootstrap.lo, difference.bootstrap.hi,
             difference.effect_size, summary.adjusted.get(name), summary.wilcoxon.get(name)]
            for name, difference in rows]
    return Drawing(figure, ["rival", "n", "difference", "lo", "hi", "bootstrap_lo", "bootstrap_hi", "effect_size",
                            "p_adjusted", "wilcoxon_p"], data,
                   f"Right of zero {OURS} is ahead. Mean with {rows[0][1].kind} interval; p is Holm-adjusted over the "
                   f"rivals. {REFERENCE} is judged by its margin, not by p.", summary.n,
                   "Pale points are the single seeds; the margin is dotted.")


def critical_differences(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Average ranks over seeds; bars join methods that Nemenyi's test does not tell apart."""
    found = ranked(summary, evidence.alpha)
    if isinstance(found, str):
        return found
    figure, (axis,) = new_figure(0.9 + 0.17 * len(found.average) + 0.07 * len(found.cliques))
    looks, names = method_looks(evidence.methods), list(found.average)
    for place, (name, rank) in enumerate(found.average.items()):
        axis.plot(rank, place, linestyle="none", **looks[name])
        axis.annotate(f"{name}  {rank:.2f}", (rank, place), xytext=(6, 0), textcoords="offset points", va="center",
                      fontsize=6.5)
    for place, (first, last) in enumerate(found.cliques):
        axis.plot([found.average[first], found.average[last]], [len(names) + 0.4 * place] * 2, color="#444444",
                  linewidth=2)
    axis.set(xlim=(0.6, len(names) + 2.5), ylim=(len(names) + 0.4 * len(found.cliques), -0.6), yticks=[],
             xlabel=f"Average rank over {found.blocks} seeds, 1 is the most accurate",
             title=f"Critical difference {found.critical:.2f} ({summary.n})")
    rows = [[name, rank, found.blocks, found.critical, found.p_value] for name, rank in found.average.items()]
    return Drawing(figure, ["method", "rank", "blocks", "critical_difference", "friedman_p"], rows,
                   f"Methods ranked by test top-1 within every seed. Friedman: p = {found.p_value:.2g}. Ranks that "
                   f"differ by less than {found.critical:.2f} are not told apart (Nemenyi, level {evidence.alpha:g}).",
                   summary.n, "Bars below join the points of such methods.")


def clusters(costs: dict[str, float], gap: float) -> list[list[str]]:
    """Names in order of cost, split wherever the next one is more than ``gap`` further."""
    found: list[list[str]] = []
    for name in sorted(costs, key=costs.get):
        if found and costs[name] - costs[found[-1][-1]] <= gap:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def _broken(panels: list[list[str]]) -> str:
    return "The horizontal axis is broken between clusters." if len(panels) > 1 else ""


def apart(costs: dict[str, float], names: list[str]) -> dict[str, float]:
    """Places of ``names`` (in order of cost), as near to their costs as a readable distance allows."""
    step = max(costs[names[-1]] - costs[names[0]], CLOSEST * len(names)) / (len(names) + 1)
    places = [costs[names[0]]]
    for name in names[1:]:
        places.append(max(costs[name], places[-1] + step))
    shift = sum(place - costs[name] for name, place in zip(names, places, strict=True)) / len(names)
    return {name: place - shift for name, place in zip(names, places, strict=True)}


def _against(evidence: Evidence, summary: Summary, panels: list[list[str]], places: dict[str, Interval], label: str,
             title: str) -> Figure:
    """Accuracy against a cost, one panel per cluster of costs."""
    height = 2.5 + 0.12 * -(-len(places) // 3)  # inches; the legend has three names a line
    figure, axes = new_panels(height, [max(1.0, len(panel)) for panel in panels])
    looks = method_looks(evidence.methods)
    for axis, panel in zip(axes, panels, strict=True):
        axis.axhline(evidence.reference["top1_test"], color="#444444", linewidth=0.8, linestyle=(0, (4, 3)),
                     label="dense checkpoint")
        for name in sorted(panel, key=evidence.methods.index):
            _point(axis, places[name], summary.methods[name], looks[name])
        _frame(axis, [places[name] for name in panel])
    axes[0].set(ylabel="Top-1 accuracy, test (%)", title=title)
    axes[max(range(len(panels)), key=lambda place: len(panels[place]))].set_xlabel(label)
    legend_below(figure, axes[::-1])
    return figure


def _frame(axis, places: list[Interval]) -> None:
    """Limits with room at both sides; few ticks where the panel is narrow."""
    ends = [end for place in places for end in (place.value, place.lo, place.hi) if end is not None]
    pad = 0.12 * (max(ends) - min(ends)) or 0.02 * abs(ends[0])
    axis.set_xlim(min(ends) - pad, max(ends) + pad)
    if len(places) == 1:
        axis.set_xticks([places[0].value], [f"{places[0].value:.2f}"])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(4))


def _forest_rows(summary: Summary) -> list[tuple[str, Difference]]:
    rows = sorted(summary.leads.items(), key=lambda item: item[1].interval.value)
    ours = summary.methods.get(OURS)
    return [(REFERENCE, ours.versus_reference), *rows] if ours and ours.versus_reference else rows


def _forest_row(axis, place: int, summary: Summary, name: str, difference: Difference, look: dict) -> None:
    ours, rival, seen = summary.methods[OURS].top1, summary.methods[name].top1, difference.interval
    seeds = [ours[seed] - rival[seed] for seed in ours if seed in rival]
    axis.plot(seeds, [place] * len(seeds), linestyle="none", marker="o", markersize=2.5, alpha=0.35, markeredgewidth=0,
              color=look["color"])
    axis.errorbar(seen.value, place, xerr=[[seen.value - seen.lo], [seen.hi - seen.value]], capsize=2, **look)
    p_value = summary.adjusted.get(name)
    if p_value is not None:
        text = "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
        axis.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=6.5)


def _point(axis, place: Interval, method: MethodSummary, look: dict) -> None:
    axis.errorbar(place.value, method.accuracy.value, xerr=_arms(place), yerr=_arms(method.accuracy), capsize=1.5,
                  elinewidth=0.9, linestyle="none", color=look["color"])
    axis.plot(place.value, method.accuracy.value, linestyle="none", label=method.method, **look)


def _arms(interval: Interval) -> list[list[float]] | None:
    if interval.lo is None:
        return None
    return [[interval.value - interval.lo], [interval.hi - interval.value]]


def _triple(interval: Interval) -> list[float | None]:
    return [interval.value, interval.lo, interval.hi]

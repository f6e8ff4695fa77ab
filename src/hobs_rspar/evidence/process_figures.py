"""Figures of how the plans came about: sensitivity, allocation, the search's reward and penalty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, heat_map, legend_below, method_looks, new_figure
from hobs_rspar.evidence.plots import ragged
from hobs_rspar.evidence.statistics import mean_interval
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.tables import group_names, kept_ratios

CRITERION = "hobs"
FLOOR = 1e-4  # of the largest score; smaller ones are drawn in the same, darkest colour
ONE_NETWORK = "n = 1 dense network"
MOST_POINTS = 48  # along a search; more episodes are averaged in equal bins
MOST_NUMBERS = 24  # groups; more rows leave no room for numbers in the cells


def sensitivity(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Heat map of every channel's score, sorted within its group."""
    groups = [group for group in (evidence.scores or {}).get("groups", []) if group["scores"].get(CRITERION)]
    if not groups:
        return f"{evidence.paths.dense}/scores.json is absent or has no '{CRITERION}' scores; the sensitivity stage " \
               "writes it"
    largest = max(max(group["scores"][CRITERION]) for group in groups)
    rows = [np.sort(np.asarray(group["scores"][CRITERION], dtype=float))[::-1] / largest for group in groups]
    figure, (axis,) = new_figure(_height(len(rows)))
    heat_map(figure, axis, np.log10(np.clip(ragged(rows), FLOOR, None)), "log$_{10}$ of score / largest score",
             cmap="viridis", vmin=np.log10(FLOOR), vmax=0)
    _name_rows(axis, [group["name"] for group in groups])
    axis.set(xlabel="Channel of the group, most sensitive first", title=f"H-OBS sensitivity ({ONE_NETWORK})")
    data = [[group["name"], rank, value] for group, row in zip(groups, rows, strict=True)
            for rank, value in enumerate(row)]
    return Drawing(figure, ["group", "rank", "score_normalised"], data,
                   "Loss added when a channel is eliminated in H-OBS's order, divided by the largest of the network; "
                   f"values below {FLOOR:g} share one colour. Seeds do not vary it.", ONE_NETWORK)


def allocation(evidence: Evidence, summary: Summary) -> Drawing:
    """Matrix of kept ratios: groups by methods."""
    names, methods = group_names(evidence), evidence.methods
    kept = {method: kept_ratios(evidence, method) for method in methods}
    values = np.array([[kept[method][name] for method in methods] for name in names])
    figure, (axis,) = new_figure(_height(len(names)) + 0.5)
    heat_map(figure, axis, values, "kept fraction", cmap="YlGnBu", vmin=0, vmax=1)
    _name_rows(axis, names)
    axis.set_xticks(range(len(methods)), methods, rotation=50, ha="right", rotation_mode="anchor")
    for label, look in zip(axis.get_xticklabels(), method_looks(methods).values(), strict=True):
        label.set_color(look["color"])
    if len(names) <= MOST_NUMBERS:
        _write_numbers(axis, values)
    axis.set_title(f"Kept fraction of each group ({summary.n})")
    data = [[name, *(kept[method][name] for method in methods)] for name in names]
    return Drawing(figure, ["group", *methods], data, "Channels kept, mean over seeds; groups in the network's order.",
                   summary.n)


def reward_curve(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Reward by episode of the methods that search."""
    searched = _searched(evidence)
    if not searched:
        return "no method of this study keeps a search history"
    figure, (axis,) = new_figure(2.4)
    rows = []
    for method, episodes in searched.items():
        curve = _curve(episodes, "reward", 1.0)
        _band(axis, curve, method, method_looks(evidence.methods)[method]["color"])
        rows += [[method, *point] for point in curve]
    axis.set(xlabel="Episode (one allocation evaluated)", ylabel="Reward",
             title=f"Reward of the search ({_seeds(searched)})")
    legend_below(figure, [axis])
    return Drawing(figure, ["method", "episode", "reward", "lo", "hi"], rows, _binned(searched) +
                   " Reward = −accuracy drop (fraction) − λ(t)·penalty; higher is better.", _seeds(searched))


def lambda_curve(evidence: Evidence, summary: Summary) -> Drawing | str:
    """λ(t) above the accuracy drop that it depends on."""
    searched = _searched(evidence)
    if not searched:
        return "no method of this study keeps a search history"
    figure, (upper, lower) = new_figure(3.2, 2, sharex=True)
    rows = []
    for method, episodes in searched.items():
        colour = method_looks(evidence.methods)[method]["color"]
        weights, drops = _curve(episodes, "lambda", 1.0), _curve(episodes, "accuracy_drop", 100.0)
        _band(upper, weights, method, colour)
        _band(lower, drops, method, colour)
        rows += [[method, *weight, *drop[1:]] for weight, drop in zip(weights, drops, strict=True)]
    upper.set(ylabel="λ(t)", title=f"Weight of the penalty ({_seeds(searched)})")
    lower.set(xlabel="Episode (one allocation evaluated)", ylabel="Accuracy drop (points)")
    legend_below(figure, [upper])
    return Drawing(figure, ["method", "episode", "lambda", "lambda_lo", "lambda_hi", "drop", "drop_lo", "drop_hi"],
                   rows, _binned(searched) + " Drop: validation accuracy of the dense network minus that of the "
                   "evaluated plan before recovery.", _seeds(searched))


def _searched(evidence: Evidence) -> dict[str, list[list[dict]]]:
    """Method to the episodes of every seed, for methods with a search history in all their cells."""
    found = {method: [(cell.get("search") or {}).get("episodes") for cell in evidence.of(method)]
             for method in evidence.methods}
    return {method: episodes for method, episodes in found.items() if all(episodes)}


def _curve(episodes: list[list[dict]], key: str, scale: float) -> list[list[float | None]]:
    """Points ``[episode, mean, lo, hi]``: averaged in bins within each seed, then over seeds with a t interval."""
    length = min(len(run) for run in episodes)
    bins = np.array_split(np.arange(length), min(length, MOST_POINTS))
    values = scale * np.array([[episode[key] for episode in run[:length]] for run in episodes], dtype=float)
    return [[float(part.mean()) + 1, *_spread(values[:, part].mean(axis=1))] for part in bins]


def _spread(values: Sequence[float]) -> list[float | None]:
    if len(values) < 2:
        return [float(values[0]), None, None]
    interval = mean_interval(values)
    return [interval.value, interval.lo, interval.hi]


def _band(axis, curve: list[list[float | None]], label: str, colour: str) -> None:
    episodes, means, lows, highs = zip(*curve, strict=True)
    axis.plot(episodes, means, color=colour, label=label)
    if None not in lows:
        axis.fill_between(episodes, lows, highs, color=colour, alpha=0.2, linewidth=0)


def _seeds(searched: dict[str, list]) -> str:
    counts = sorted({len(episodes) for episodes in searched.values()})
    return f"n = {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} seeds"


def _binned(searched: dict[str, list[list[dict]]]) -> str:
    longest = max(min(len(run) for run in episodes) for episodes in searched.values())
    width = -(-longest // min(longest, MOST_POINTS))
    each = f"Each point averages up to {width} episodes of a seed. " if width > 1 else ""
    return f"{each}Line: mean over seeds; band: its 95 % t interval."


def _height(rows: int) -> float:
    return 0.9 + (0.17 if rows <= MOST_NUMBERS else 0.11) * rows


def _name_rows(axis, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=6 if len(names) <= MOST_NUMBERS else 4.5)


def _write_numbers(axis, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5,
                  color="white" if value > 0.55 else "black")

"""Figures of how the plans came about: sensitivity, allocation, the search's reward, penalty and measured plans."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence

import numpy as np

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import Drawing, heat_map, legend_below, method_looks, new_figure
from hobs_rspar.evidence.pairing import REFERENCE
from hobs_rspar.evidence.plots import ragged
from hobs_rspar.evidence.statistics import mean_interval
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.tables import group_names, kept_ratios

CRITERION = "hobs"
STEPS = {"cut": ("criterion alone", "o"), "batchnorm": ("+ batch norms", "D"), "refit": ("+ refit", "s")}
FLOOR = 1e-4  # of the largest score; smaller ones are drawn in the same, darkest colour
EXPECTED = "Drop: expected of the plans of an update's episodes, by the reward that is fitted to measured plans."
ONE_NETWORK = "n = 1 dense network"
MOST_POINTS = 48  # along a search; more policy updates are averaged in equal bins
MOST_NUMBERS = 24  # groups; more rows leave no room for numbers in the cells


def sensitivity(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Heat map of every channel's score, sorted within its group."""
    groups = [group for group in (evidence.scores or {}).get("groups", []) if group["scores"].get(CRITERION)]
    if not groups:
        return f"{evidence.paths.dense}/scores.json is absent, of another dense network than the cells', or has no " \
               f"'{CRITERION}' scores; the sensitivity stage writes it"
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


def reconstruction(evidence: Evidence, summary: Summary) -> Drawing | str:
    """What is left of the consumers' outputs, step by step of repair, as the error on held-out images."""
    methods = [method for method in evidence.methods if method != REFERENCE]
    if not methods:
        return "the study has no method that removes channels"
    errors = {method: _errors(evidence, method) for method in methods}
    figure, (axis,) = new_figure(0.9 + 0.2 * len(methods))
    rows = []
    for place, (method, steps) in enumerate(errors.items()):
        colour = method_looks(evidence.methods)[method]["color"]
        axis.plot(list(steps.values()), [place] * len(steps), color=colour, linewidth=0.8, zorder=1)
        for step, error in steps.items():
            axis.plot(error, place, marker=STEPS[step][1], markersize=5, color=colour, linestyle="none",
                      markerfacecolor="white" if step == "cut" else colour)
            rows.append([method, step, error, len(evidence.of(method))])
    for label, marker in STEPS.values():
        axis.plot([], [], marker=marker, linestyle="none", color="#444444", label=label,
                  markerfacecolor="white" if marker == "o" else "#444444")
    axis.set_yticks(range(len(methods)), methods)
    axis.set(xlabel="Relative error of the consumers' outputs", ylim=(len(methods) - 0.4, -0.6),
             title=f"Feature maps before recovery ({summary.n})")
    axis.set_xlim(left=0)
    axis.grid(visible=False, axis="y")
    legend_below(figure, [axis])
    return Drawing(figure, ["method", "step", "error", "n"], rows,
                   "Squared difference to the dense network's feature maps (outputs of the layers that read the "
                   "pruned channels), relative to their size, mean over layers and seeds, on held-out validation "
                   "images before recovery. 1: as much is wrong as there was. Methods that train are compared with "
                   "the weights that they trained.", summary.n)


def reward_curve(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Reward by policy update of the methods that search."""
    searched = _searched(evidence)
    if not searched:
        return "no method of this study learns by policy updates"
    figure, (axis,) = new_figure(2.4)
    rows = []
    for method, runs in searched.items():
        curve = _curve(runs, "reward", 1.0)
        _band(axis, curve, method, method_looks(evidence.methods)[method]["color"])
        rows += [[method, *point] for point in curve]
    axis.set(xlabel="Policy update", ylabel="Reward",
             title=f"Reward of the search ({_seeds(searched)})")
    legend_below(figure, [axis])
    return Drawing(figure, ["method", "update", "reward", "lo", "hi"], rows, _binned(searched) +
                   f" Reward = −expected accuracy drop (fraction) − λ(t)·penalty; higher is better. {EXPECTED}",
                   _seeds(searched))


def lambda_curve(evidence: Evidence, summary: Summary) -> Drawing | str:
    """λ(t) above the accuracy drop that it depends on."""
    searched = _searched(evidence)
    if not searched:
        return "no method of this study learns by policy updates"
    figure, (upper, lower) = new_figure(3.2, 2, sharex=True)
    rows = []
    for method, runs in searched.items():
        colour = method_looks(evidence.methods)[method]["color"]
        weights, drops = _curve(runs, "lambda", 1.0), _curve(runs, "accuracy_drop", 100.0)
        _band(upper, weights, method, colour)
        _band(lower, drops, method, colour)
        rows += [[method, *weight, *drop[1:]] for weight, drop in zip(weights, drops, strict=True)]
    upper.set(ylabel="λ(t)", title=f"Weight of the penalty ({_seeds(searched)})")
    lower.set(xlabel="Policy update", ylabel="Expected drop (points)")
    legend_below(figure, [upper])
    return Drawing(figure, ["method", "update", "lambda", "lambda_lo", "lambda_hi", "drop", "drop_lo", "drop_hi"],
                   rows, f"{_binned(searched)} {EXPECTED}", _seeds(searched))


def measured_plans(evidence: Evidence, summary: Summary) -> Drawing | str:
    """Accuracy drop of every plan that a search ran on validation images, in order."""
    searched = _searched(evidence, "measured")
    if not searched:
        return "no method of this study keeps the plans that its search measured"
    figure, (axis,) = new_figure(2.4)
    rows = []
    for method, runs in searched.items():
        seeds = [cell["seed"] for cell in evidence.of(method)]
        points = [[method, seed, number, 100.0 * plan["accuracy_drop"], plan["loss"], plan["updates"]]
                  for seed, run in zip(seeds, runs, strict=True) for number, plan in enumerate(run, 1)]
        axis.plot([point[2] for point in points], [point[3] for point in points], linestyle="none", alpha=0.5,
                  label=method, **method_looks(evidence.methods)[method])
        rows += points
    axis.set(xlabel="Plans run so far", ylabel="Accuracy drop (points)",
             title=f"Plans measured by the search ({_seeds(searched)})")
    legend_below(figure, [axis])
    return Drawing(figure, ["method", "seed", "plan", "drop", "loss", "updates"], rows,
                   "One point per plan that was pruned, repaired and run: validation accuracy of the dense network "
                   "minus that of the plan, before recovery. First uniform widths and plans around them, then the "
                   "allocator's favourites, round by round.", _seeds(searched))


def _errors(evidence: Evidence, method: str) -> dict[str, float]:
    """Step of repair to the error after it, mean over seeds."""
    cells = [cell["repair_steps"] for cell in evidence.of(method)]
    return {step: plain.fmean(cell[step]["reconstruction_error"] for cell in cells) for step in cells[0]}


def _searched(evidence: Evidence, history: str = "episodes") -> dict[str, list[list[dict]]]:
    """Method to the records of every seed, for methods with such a history in all their cells."""
    found = {method: [(cell.get("search") or {}).get(history) for cell in evidence.of(method)]
             for method in evidence.methods}
    return {method: runs for method, runs in found.items() if all(runs)}


def _curve(runs: list[list[dict]], key: str, scale: float) -> list[list[float | None]]:
    """Points ``[update, mean, lo, hi]``: averaged in bins within each seed, then over seeds with a t interval."""
    length = min(len(run) for run in runs)
    bins = np.array_split(np.arange(length), min(length, MOST_POINTS))
    values = scale * np.array([[record[key] for record in run[:length]] for run in runs], dtype=float)
    return [[float(part.mean()) + 1, *_spread(values[:, part].mean(axis=1))] for part in bins]


def _spread(values: Sequence[float]) -> list[float | None]:
    if len(values) < 2:
        return [float(values[0]), None, None]
    interval = mean_interval(values)
    return [interval.value, interval.lo, interval.hi]


def _band(axis, curve: list[list[float | None]], label: str, colour: str) -> None:
    updates, means, lows, highs = zip(*curve, strict=True)
    axis.plot(updates, means, color=colour, label=label)
    if None not in lows:
        axis.fill_between(updates, lows, highs, color=colour, alpha=0.2, linewidth=0)


def _seeds(searched: dict[str, list]) -> str:
    counts = sorted({len(runs) for runs in searched.values()})
    return f"n = {' to '.join(map(str, counts[:1] + counts[1:][-1:]))} seeds"


def _binned(searched: dict[str, list[list[dict]]]) -> str:
    longest = max(min(len(run) for run in runs) for runs in searched.values())
    width = -(-longest // min(longest, MOST_POINTS))
    each = f"Each point averages up to {width} policy updates of a seed. " if width > 1 else ""
    return f"{each}Line: mean over seeds; band: its 95 % t interval."


def _height(rows: int) -> float:
    return 0.9 + (0.17 if rows <= MOST_NUMBERS else 0.11) * rows


def _name_rows(axis, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names, fontsize=6 if len(names) <= MOST_NUMBERS else 4.5)


def _write_numbers(axis, values: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(values):
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5,
                  color="white" if value > 0.55 else "black")

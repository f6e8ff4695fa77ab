"""The published plotting functions. Each returns the matplotlib ``Figure`` and saves it where a path is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from hobs_rspar.errors import UserError
from hobs_rspar.evidence.figure_style import STYLE, heat_map, legend_below, method_looks, new_figure, save


def plot_training_curves(history: Mapping[str, Sequence[float]] | Sequence[Mapping], save_path: str | Path | None = None
                         ) -> Figure:
    """Loss and accuracy by epoch.

    Args:
        history: name to one number per epoch (``{"train_loss": [...], "val_acc": [...]}``), or one dictionary per
            epoch as in recovery.json. Names with ``loss`` go to the upper panel, with ``acc`` or ``top`` to the lower.
        save_path: file to write; its ending decides the format.

    Returns:
        The figure.

    Raises:
        UserError: there is nothing to plot.
    """
    series = history if isinstance(history, Mapping) else _by_name(history)
    panels = {"Loss": [name for name in series if "loss" in name],
              "Accuracy": [name for name in series if "acc" in name or "top" in name]}
    panels = {label: names for label, names in panels.items() if names}
    if not panels:
        raise UserError(f"history has no series to plot (keys: {', '.join(map(str, series)) or 'none'}); a name with "
                        "'loss', 'acc' or 'top' is needed, such as train_loss or validation_top1")
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(0.4 + 1.7 * len(panels), len(panels), sharex=True)
        for axis, (label, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                axis.plot(range(1, len(series[name]) + 1), series[name], marker="o", label=name.replace("_", " "))
            axis.set_ylabel(label)
            axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes[-1].set_xlabel("Epoch")
    return _finished(figure, save_path)


def plot_pruning_comparison(methods: Sequence[str], accuracies: Sequence[float], speedups: Sequence[float],
                            save_path: str | Path | None = None) -> Figure:
    """Accuracy against speedup, one point per method.

    Args:
        methods: names.
        accuracies: top-1, percent.
        speedups: dense time / pruned time.
        save_path: file to write; its ending decides the format.

    Returns:
        The figure.

    Raises:
        UserError: the three have unequal lengths or are empty.
    """
    if not len(methods) == len(accuracies) == len(speedups) or not len(methods):
        raise UserError(f"methods, accuracies and speedups have {len(methods)}, {len(accuracies)} and {len(speedups)} "
                        "entries; all three need one per method")
    looks = method_looks(methods)
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(2.8)
        for name, accuracy, speedup in zip(methods, accuracies, speedups, strict=True):
            axis.plot(speedup, accuracy, linestyle="none", label=name, **looks[name])
        axis.set(xlabel="Speedup (dense time / pruned time)", ylabel="Top-1 accuracy (%)")
        legend_below(figure, [axis])
    return _finished(figure, save_path)


def plot_sensitivity_heatmap(sensitivity_scores: Mapping[str, Sequence[float]] | Sequence[Sequence[float]],
                             layer_names: Sequence[str], save_path: str | Path | None = None) -> Figure:
    """Scores of every filter, one row per layer; layers may differ in width.

    Args:
        sensitivity_scores: layer name to scores [filters], or the scores in the order of ``layer_names``.
        layer_names: rows from top to bottom.
        save_path: file to write; its ending decides the format.

    Returns:
        The figure.

    Raises:
        UserError: a layer has no scores.
    """
    if isinstance(sensitivity_scores, Mapping):
        absent = [name for name in layer_names if name not in sensitivity_scores]
        if absent:
            raise UserError(f"sensitivity_scores has no layer '{absent[0]}'; it has: {', '.join(sensitivity_scores)}")
        rows = [sensitivity_scores[name] for name in layer_names]
    else:
        rows = list(sensitivity_scores)
    if not rows or len(rows) != len(layer_names):
        raise UserError(f"sensitivity_scores has {len(rows)} rows and layer_names {len(layer_names)} names; each layer "
                        "needs one row")
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = new_figure(0.8 + 0.16 * len(rows))
        heat_map(figure, axis, ragged(rows), "Score", cmap="viridis")
        axis.set_yticks(range(len(rows)), layer_names)
        axis.set_xlabel("Filter")
    return _finished(figure, save_path)


def plot_lambda_evolution(lambda_history: Sequence[float], acc_history: Sequence[float],
                          save_path: str | Path | None = None) -> Figure:
    """λ(t) above the accuracy that it depends on, by step.

    Args:
        lambda_history: one λ per step.
        acc_history: one accuracy per step, in the unit that you want to read.
        save_path: file to write; its ending decides the format.

    Returns:
        The figure.

    Raises:
        UserError: unequal lengths.
    """
    if len(lambda_history) != len(acc_history) or not len(lambda_history):
        raise UserError(f"lambda_history has {len(lambda_history)} entries and acc_history {len(acc_history)}; both "
                        "need one per step")
    with matplotlib.rc_context(STYLE):
        figure, (upper, lower) = new_figure(3.0, 2, sharex=True)
        steps = range(1, len(lambda_history) + 1)
        upper.plot(steps, lambda_history, color="#d55e00")
        lower.plot(steps, acc_history, color="#0072b2")
        upper.set_ylabel("λ(t)")
        lower.set(xlabel="Step", ylabel="Accuracy")
    return _finished(figure, save_path)


def ragged(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of unequal length as a matrix [rows, longest], filled up with NaN."""
    matrix = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for index, row in enumerate(rows):
        matrix[index, :len(row)] = np.asarray(row, dtype=float)
    return matrix


def _by_name(epochs: Sequence[Mapping]) -> dict[str, list[float]]:
    names = [name for name in epochs[0] if all(name in epoch for epoch in epochs)] if epochs else []
    return {name: [epoch[name] for epoch in epochs] for name in names}


def _finished(figure: Figure, save_path: str | Path | None) -> Figure:
    if save_path is not None:
        save(figure, save_path)
    return figure

"""How every figure looks: sizes, colours, deterministic files. Uses no pyplot, so no window and no global state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 3.5  # inches: one column of a two-column page
PIXELS_PER_INCH = 240
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib, so that the files are the same bytes everywhere
    "font.size": 7, "axes.titlesize": 7.5, "axes.labelsize": 7, "xtick.labelsize": 6.5, "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5, "axes.titlelocation": "left", "axes.titlepad": 6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "axes.edgecolor": "#444444",
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5,
    "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.5, "axes.axisbelow": True,
    "lines.linewidth": 1.2, "lines.markersize": 4, "legend.frameon": False,
    "svg.hashsalt": "hobs-rspar", "figure.facecolor": "white",
}
# One colour per method throughout, from the palettes of Okabe and Ito and of Tol, both safe for colour-blind readers.
COLOURS = {"unpruned": "#000000", "random": "#8c8c8c", "random_repair": "#999933", "l1": "#56b4e9",
           "l1_repair": "#332288", "l2_global": "#0072b2", "taylor_oneshot": "#009e73", "depgraph_seed": "#cc79a7",
           "hobs_uniform": "#e69f00", "hobs_rspar_ppo": "#882255", "hobs_rspar": "#d55e00", "depgraph": "#aa4499",
           "jtp": "#117733", "bilevel": "#cc6677", "structalign": "#44aa99", "udfc": "#ddcc77", "taylor": "#228833",
           "amc": "#66ccee", "decore": "#ee6677", "autocompress": "#4477aa", "gnn": "#ccbb44", "hrank": "#997700",
           "fpgm": "#6699cc", "lamp": "#004488", "hobs_rspar_dqn": "#ee3377"}
MORE_COLOURS = ("#88ccee", "#44aa99", "#117733", "#ddcc77", "#cc6677", "#aa4499")
SHAPES = {"unpruned": "o", "random": "s", "random_repair": "p", "l1": "v", "l1_repair": "<", "l2_global": "^",
          "taylor_oneshot": "D", "depgraph_seed": "P", "hobs_uniform": "X", "hobs_rspar_ppo": ">", "hobs_rspar": "*",
          "depgraph": "h", "jtp": "d", "bilevel": "H", "structalign": "8", "udfc": "h", "taylor": "d", "amc": "s",
          "decore": "o", "autocompress": "D", "gnn": "^", "hrank": "v", "fpgm": "p", "lamp": "<",
          "hobs_rspar_dqn": "h", "udfc_seed": "s", "jtp_seed": "^", "bilevel_seed": "v", "structalign_seed": "D"}
MORE_SHAPES = "hdH8"
LARGER = {"*": 7.0, "P": 5.0, "X": 5.0}  # points; these shapes fill less of their box


@dataclass(frozen=True)
class Drawing:
    """A drawn figure, the data beside it (header and rows), the sentence that says how to read it, and its n.

    Attributes:
        drawn: what is true of the drawing only, not of the page's chart of the same rows.
    """

    figure: Figure
    header: list[str]
    rows: list[list]
    caption: str
    n: str
    drawn: str = ""


def method_looks(methods: Sequence[str]) -> dict[str, dict]:
    """Method name to ``color``, ``marker``, ``markersize``: shapes differ, so that colour is never the only sign.

    A version that is simplified as in the documents (``_seed``) has the colour of the paper's.
    """
    seeds = {name: COLOURS[base] for name in methods if (base := name.removesuffix("_seed")) in COLOURS}
    colours = _completed(seeds | COLOURS, methods, MORE_COLOURS)
    shapes = _completed(SHAPES, methods, MORE_SHAPES)
    return {name: {"color": colours[name], "marker": shapes[name], "markersize": LARGER.get(shapes[name], 4.0)}
            for name in methods}


def _completed(looks: dict[str, str], methods: Sequence[str], more: Sequence[str]) -> dict[str, str]:
    """Looks for all methods; those without one of their own take turns."""
    others = [name for name in methods if name not in looks]
    return looks | {name: more[place % len(more)] for place, name in enumerate(others)}


def new_figure(height: float, rows: int = 1, **options) -> tuple[Figure, list[Axes]]:
    """A figure one column wide with ``rows`` axes below each other; heights in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **options)
    return figure, list(axes[:, 0])


def new_panels(height: float, widths: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """A figure one column wide with axes side by side that share the vertical axis: one broken horizontal axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(wspace=0.02)
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axis in axes[1:]:
        axis.spines["left"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    return figure, list(axes)


LONG = 18  # letters of a name of which three do not fit beside each other


def legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """Puts the legend under the axes, where it cannot cover data; a name drawn in several axes is listed once."""
    found = {label: handle for axis in axes
             for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    handles, labels = list(found.values()), list(found)
    columns = min(2 if max(map(len, labels), default=0) > LONG else 3, max(1, len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncol=columns, columnspacing=1.2, handletextpad=0.5,
                  handlelength=1.6)


def heat_map(figure: Figure, axes: Axes, values, label: str, **options):
    """A matrix in colour with its colour bar; NaN stays blank."""
    axes.grid(False)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **options)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return image


def file_bytes(figure: Figure) -> dict[str, bytes]:
    """The figure as ``svg`` and ``png``, the same bytes on every run; the layout is computed once."""
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return {"svg": _saved(figure, "svg", {"Date": None, "Creator": None}),
                "png": _saved(figure, "png", {"Software": None})}


def save(figure: Figure, path: str | Path) -> None:
    """Writes one file whose format is its ending; creates the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=PIXELS_PER_INCH, metadata=dates.get(path.suffix.lower()))


def _saved(figure: Figure, kind: str, metadata: dict) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=PIXELS_PER_INCH, metadata=metadata)
    return stream.getvalue()

"""The page's figures to hover over: Vega-Lite charts of the very rows that the drawn figures have, by Altair.

The page shows the drawn figure until its chart is there, and where scripts do not run. A click on a method of a legend
brings it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import altair as alt
import vl_convert

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.figure_style import method_looks
from hobs_rspar.evidence.pairing import OURS, REFERENCE

Rows = list[dict]
Sized = tuple[alt.Chart | alt.LayerChart, int]  # a chart and its height in pixels
SHAPES = ("circle", "square", "cross", "diamond", "triangle-up", "triangle-down", "triangle-right", "triangle-left")
OPEN = alt.Scale(zero=False)  # an axis that does not begin at zero
HEIGHT, ROW = 280, 15  # pixels: of a chart, and of a line of a matrix


@cache
def renderer() -> str:
    """The JavaScript that draws the charts (Vega, Vega-Lite, vega-embed): for a page without outside requests."""
    return vl_convert.javascript_bundle()


class Charts:
    """Charts of one study, in the methods' colours.

    Args:
        evidence: of the study.
    """

    def __init__(self, evidence: Evidence):
        self.evidence, looks = evidence, method_looks(evidence.methods)
        self.colours = {name: look["color"] for name, look in looks.items()}
        self.shapes = {name: SHAPES[place % len(SHAPES)] for place, name in enumerate(looks)}
        self.picked = alt.selection_point("picked", fields=["method"], bind="legend")
        self.faded = alt.when(self.picked).then(alt.value(1.0)).otherwise(alt.value(0.12))

    def of(self, name: str, header: Sequence[str], rows: Sequence[Sequence]) -> dict | None:
        """The Vega-Lite specification of a figure; None where there is no chart for it.

        Args:
            name: of the figure.
            header: names of the columns, as in the figure's CSV file.
            rows: its lines.
        """
        draw: Callable[[Rows], Sized] | None = getattr(self, f"_{name}", None)
        if draw is None:
            return None
        return _spec(*draw([dict(zip(header, row, strict=True)) for row in rows]))

    def explorer(self) -> dict:
        """One method's channels in every group, seed by seed, with the reason; which method is chosen above it."""
        methods = list(self.evidence.methods)
        plans = [{"method": cell["method"], "seed": cell["seed"], "group": group["name"], "kept": group["kept_count"],
                  "channels": group["channels"], "reason": group["reason"]}
                 for cell in self.evidence.cells.values() for group in cell["plan"]["groups"]]
        groups = list(dict.fromkeys(plan["group"] for plan in plans))
        menu = alt.binding_select(options=methods, name="Method ")
        shown = OURS if OURS in methods else methods[0]
        chosen = alt.selection_point("chosen", fields=["method"], bind=menu, value=shown)
        base = _base(plans).transform_filter(chosen).encode(y=alt.Y("group:N", title=None, sort=groups))
        whole = base.mark_bar(color="#8c8c8c", opacity=0.25).encode(x=alt.X("max(channels):Q", title="Channels kept"),
                                                                    tooltip=["group:N", "max(channels):Q"])
        kept = base.mark_tick(thickness=3, size=ROW - 3).encode(
            x="kept:Q", tooltip=["method:N", "seed:N", "group:N", "kept:Q", "channels:Q", "reason:N"],
            color=self._colour(plans, legend=None))
        return _spec(alt.layer(whole, kept).add_params(chosen), ROW * len(groups))

    def _accuracy_macs(self, rows: Rows) -> Sized:
        """Of the pruned networks; the reference, at all MACs, is a line."""
        pruned = [row for row in rows if row["method"] != REFERENCE] or rows
        chart, height = self._against(pruned, "macs_ratio", "Kept fraction of the dense network's MACs")
        reference = [row for row in rows if row["method"] == REFERENCE]
        line = _base(reference).mark_rule(strokeDash=[4, 3]).encode(y="top1:Q", tooltip=_tips(rows))
        return alt.layer(chart, line), height

    def _accuracy_latency(self, rows: Rows) -> Sized:
        return self._against(rows, "latency_ms", "Latency, p50 (ms)", ("latency_lo", "latency_hi"))

    def _against(self, rows: Rows, cost: str, title: str, ends: tuple[str, str] | None = None) -> Sized:
        """Accuracy against a cost, intervals in one or both directions."""
        base = _base(rows).encode(
            x=alt.X(f"{cost}:Q", title=title, scale=OPEN), y=alt.Y("top1:Q", title="Top-1 accuracy, test (%)",
                                                                   scale=OPEN),
            color=self._colour(rows), opacity=self.faded, tooltip=_tips(rows))
        layers = [base.mark_rule().encode(y="top1_lo:Q", y2="top1_hi:Q")]
        if ends:
            layers.append(base.mark_rule().encode(x=f"{ends[0]}:Q", x2=f"{ends[1]}:Q"))
        points = base.mark_point(filled=True, size=70).encode(shape=self._shape(rows)).add_params(self.picked)
        return alt.layer(points, *layers), HEIGHT

    def _paired_differences(self, rows: Rows) -> Sized:
        base = _base(rows).encode(
            y=alt.Y("rival:N", title=None, sort=[row["rival"] for row in rows]), tooltip=_tips(rows),
            color=self._colour(rows, "rival", legend=None))
        zero = alt.Chart(alt.Data(values=[{"zero": 0}])).mark_rule(strokeDash=[4, 3]).encode(x="zero:Q")
        label = f"{OURS} − rival, top-1 on the test set (points)"
        bars = base.mark_rule(size=2).encode(x=alt.X("lo:Q", title=label), x2="hi:Q")
        points = base.mark_point(filled=True, size=70).encode(x=alt.X("difference:Q", title=label))
        return alt.layer(zero, bars, points), 20 * len(rows) + 20

    def _recovery_budget(self, rows: Rows) -> Sized:
        ends = [row if row["top1_lo"] is None else
                row | {"lo": _error(row["top1_hi"]), "hi": _error(row["top1_lo"])} for row in rows]
        return self._errors(ends, "top1", alt.X("images:O", title="Images of recovery (not to scale)",
                                                axis=alt.Axis(format=",", labelAngle=0)), "Test error (%), log scale")

    def _recovery_curves(self, rows: Rows) -> Sized:
        return self._errors(rows, "validation_top1", alt.X("images:Q", title="Images of recovery"),
                            "Validation error (%), log scale")

    def _errors(self, rows: Rows, accuracy: str, x: alt.X, title: str) -> Sized:
        """Error on a logarithmic scale along a recovery; a band where the rows have ends of it.

        The means set the axis: with two seeds the end of a band may be no error at all.
        """
        errors = [_error(row[accuracy]) for row in rows]
        scale = alt.Scale(type="log", nice=False, domain=[0.85 * min(errors), 1.1 * max(errors)])
        base = _base([row | {"error": error} for row, error in zip(rows, errors)]).encode(
            x=x, y=alt.Y("error:Q", title=title, scale=scale),
            color=self._colour(rows), opacity=self.faded, tooltip=_tips(rows))
        points = base.mark_point(filled=True, size=50).encode(shape=self._shape(rows)).add_params(self.picked)
        bands = [base.mark_area(clip=True).encode(y="lo:Q", y2="hi:Q", opacity=alt.value(0.15))] * ("lo" in rows[0])
        return alt.layer(base.mark_line(), points, *bands), HEIGHT

    def _allocation(self, rows: Rows) -> Sized:
        cells = [{"group": row["group"], "method": method, "kept fraction": row[method]}
                 for row in rows for method in list(row)[1:]]
        chart = _base(cells).mark_rect().encode(
            x=alt.X("method:N", title=None, sort=list(rows[0])[1:], axis=alt.Axis(labelAngle=-50)),
            y=alt.Y("group:N", title=None, sort=[row["group"] for row in rows]), tooltip=_tips(cells),
            color=alt.Color("kept fraction:Q", title="kept", scale=alt.Scale(scheme="yellowgreenblue", domain=[0, 1])))
        return chart, ROW * len(rows)

    def _sensitivity(self, rows: Rows) -> Sized:
        groups = list(dict.fromkeys(row["group"] for row in rows))
        ranked = [row | {"score_normalised": float(f"{row['score_normalised']:.3g}")} for row in rows]
        return _base(ranked).mark_rect().encode(
            x=alt.X("rank:O", title="Channel of the group, most sensitive first",
                    axis=alt.Axis(labelAngle=0, values=list(range(0, max(row["rank"] for row in rows) + 1, 8)))),
            y=alt.Y("group:N", title=None, sort=groups), tooltip=["group:N", "rank:Q", "score_normalised:Q"],
            color=alt.Color("score_normalised:Q", title="score / largest", scale=alt.Scale(
                type="log", scheme="viridis", domain=[1e-4, 1], clamp=True))
        ), ROW * len(groups)

    def _reward_curve(self, rows: Rows) -> Sized:
        return self._along(rows, "reward", "lo", "hi", "Reward")

    def _lambda_curve(self, rows: Rows) -> Sized:
        return self._along(rows, "lambda", "lambda_lo", "lambda_hi", "λ(t)")

    def _along(self, rows: Rows, value: str, lo: str, hi: str, title: str) -> Sized:
        """A mean with its band along the policy updates."""
        base = _base(rows).encode(x=alt.X("update:Q", title="Policy update"), color=self._colour(rows),
                                  tooltip=_tips(rows))
        line = base.mark_line(point=True).encode(y=alt.Y(f"{value}:Q", title=title, scale=OPEN))
        band = base.mark_area(opacity=0.2).encode(y=f"{lo}:Q", y2=f"{hi}:Q")
        return alt.layer(line, band), HEIGHT

    def _reconstruction(self, rows: Rows) -> Sized:
        methods = list(dict.fromkeys(row["method"] for row in rows))
        base = _base(rows).encode(
            x=alt.X("error:Q", title="Relative error of the consumers' outputs"), tooltip=_tips(rows),
            y=alt.Y("method:N", title=None, sort=methods), color=self._colour(rows, legend=None))
        points = base.mark_point(filled=True, size=60).encode(
            shape=alt.Shape("step:N", title=None, sort=["cut", "batchnorm", "refit"]))
        return alt.layer(base.mark_line(), points), 20 * len(methods) + 20

    def _critical_differences(self, rows: Rows) -> Sized:
        return _base(rows).mark_point(filled=True, size=70).encode(
            x=alt.X("rank:Q", title="Average rank, 1 is the most accurate", scale=OPEN), tooltip=_tips(rows),
            y=alt.Y("method:N", title=None, sort=[row["method"] for row in rows]),
            color=self._colour(rows, legend=None)), 20 * len(rows) + 20

    def _measured_plans(self, rows: Rows) -> Sized:
        return _base(rows).mark_point(filled=True, size=40).encode(
            x=alt.X("plan:Q", title="Plans run so far"), y=alt.Y("drop:Q", title="Accuracy drop (points)", scale=OPEN),
            color=self._colour(rows), shape=self._shape(rows), opacity=self.faded, tooltip=_tips(rows)
        ).add_params(self.picked), HEIGHT

    def _roofline(self, rows: Rows) -> Sized:
        colours = {"dense": self.colours.get(REFERENCE, "#000000")} | self.colours
        scale = alt.Scale(type="log", nice=False)
        base = _base(rows).encode(x=alt.X("intensity:Q", title="Multiply-accumulates per byte", scale=scale))
        points = base.mark_point(filled=True, size=60).encode(
            y=alt.Y("gmacs:Q", title="GMAC/s", scale=scale), tooltip=_tips(rows),
            color=alt.Color("network:N", title=None, scale=_among(colours, rows, "network")))
        return alt.layer(points, base.mark_line(color="#444444").encode(y="roof:Q")), HEIGHT

    def _colour(self, rows: Rows, field: str = "method", **options) -> alt.Color:
        """The methods that the rows have, each in its colour."""
        return alt.Color(f"{field}:N", title=None, scale=_among(self.colours, rows, field), **options)

    def _shape(self, rows: Rows) -> alt.Shape:
        return alt.Shape("method:N", title=None, scale=_among(self.shapes, rows, "method"))


def _error(accuracy: float) -> float:
    """In percent; never zero, which a logarithmic axis does not have."""
    return max(100 - accuracy, 0.01)


def _base(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))


def _among(looks: dict[str, str], rows: Rows, field: str) -> alt.Scale:
    seen = {row[field] for row in rows}
    shown = {name: look for name, look in looks.items() if name in seen}
    return alt.Scale(domain=list(shown), range=list(shown.values()))


def _spec(chart: alt.Chart | alt.LayerChart, height: int) -> dict:
    """As wide as the page has room."""
    chart = chart.configure_legend(orient="bottom", columns=3).configure_axis(grid=True)
    chart = chart.configure_axisX(labelFlush=False, labelSeparation=6)  # moved in, the last label hits another
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    return chart.properties(background="transparent", width="container", height=height, autosize=fit,
                            padding=10).to_dict()


def _tips(rows: Rows) -> list[alt.Tooltip]:
    """Every column of the rows, numbers to four digits."""
    return [alt.Tooltip(f"{name}:Q", format=",.4~r") if isinstance(value, float) else alt.Tooltip(f"{name}:N")
            for name, value in rows[0].items()]

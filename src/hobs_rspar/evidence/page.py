"""index.html: one file that holds everything: figures, charts, the scripts that draw them; no request to anywhere."""

from __future__ import annotations

import ast
import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from hobs_rspar.config import METHODS
from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.claims import FAILS, HOLDS, NOT_MEASURED, Claim
from hobs_rspar.evidence.figure_style import method_looks
from hobs_rspar.evidence.figures import ReportFigure
from hobs_rspar.evidence.interactive import Charts, renderer
from hobs_rspar.evidence.statistics import Interval
from hobs_rspar.evidence.summary import LATENCY_BATCH, OURS, REFERENCE, THROUGHPUT_BATCH, MethodSummary, Summary
from hobs_rspar.evidence.table_formats import NOT_MEASURED as EMPTY
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import budget, conditions, recovery_in_words, subject, wilcoxon_note

TEMPLATE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html.j2", "page.js"))
T1_HEADINGS = ("Method", "n", "Top-1, test (%)", "Before recovery (%)", "MACs kept", "Parameters kept",
               f"Latency, batch {LATENCY_BATCH} (ms)", f"Throughput, batch {THROUGHPUT_BATCH} (images/s)",
               "Energy (J/image)", f"Speedup, batch {THROUGHPUT_BATCH}", f"Difference to {REFERENCE} (points)",
               "Adjusted p")
LIMITS = """\
All cells start from one dense network. A seed varies allocation and recovery, not the dense training, so no interval \
here includes the spread over dense networks.
{n} per method. {wilcoxon}
The {images} test images alone give an accuracy a standard error of {error:.2f} points; differences are paired on the \
same images.
Every method has {recovery}. Another recovery may change the order of the methods.
One network, one data set, one budget ({budget}): nothing follows for others, and a claim about a Pareto front would \
need five operating points or more.
The methods differ in criterion and allocator together; which of the two matters is not separated here.
The published numbers are quoted only to be tested; the tables that print them contradict themselves.
{timings}
"""

BEHIND = {"C1": "C1", "C2": "C2", "C3": "T11", "C4": "T6", "C5": "T5", "C6": "T1", "C7": "recovery",
          "C8": "T10_allocators"}  # the table where a claim's numbers are
FOREIGN = ("The dense network was not trained here and has probably seen our validation images: validation accuracies "
           "are no held-out figures, and a search that looks at them sees what the network knows by heart.")
PLACED = ("claims", "T1", "T16")  # tables with a place of their own; the others follow the figures, in their order


@dataclass(frozen=True)
class Parts:
    """What the page shows: the tables by name, the claims and the figures."""

    tables: dict[str, Table]
    claims: list[Claim]
    figures: list[ReportFigure]


def render(evidence: Evidence, summary: Summary, parts: Parts) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    looks = method_looks(evidence.methods)
    return template.render(
        evidence=evidence, summary=summary, parts=parts, subject=subject(evidence), budget=budget(evidence),
        planned=len(evidence.params.cells), findings=findings(evidence, summary),
        conditions=conditions(evidence).removeprefix("Conditions: "),
        claims=[_claim(claim, parts.tables) for claim in parts.claims],
        t1_headings=T1_HEADINGS, t1_rows=[_t1(method, summary) for method in summary.methods.values()],
        colours={name: look["color"] for name, look in looks.items()}, ours=OURS, images=_images(parts.figures),
        setup=setup(evidence), recipe=recipe(evidence), limits=limitations(evidence, summary),
        further=[table for name, table in parts.tables.items() if name not in PLACED],
        flags=[flag for method in summary.methods.values() for flag in method.flags],
        methods={name: about(name) for name in summary.methods}, charts=_in_script(_charts(evidence, parts.figures)),
        renderer=Markup(renderer()), script=Markup(SCRIPT.read_text(encoding="utf-8")))


def about(method: str) -> tuple[str, list[str]]:
    """First line and further paragraphs of a method's docstring; where there is none, that."""
    text = ast.get_docstring(ast.parse((METHODS / f"{method}.py").read_text(encoding="utf-8")))
    first, *rest = (text or f"methods/{method}.py has no docstring yet.").split("\n\n")
    return first, rest


def number(value: float | None, decimals: int) -> str:
    """A number for readers, with a true minus sign; a dash where not measured."""
    return Column("", "", decimals).read(value)


def with_interval(interval: Interval | None, decimals: int) -> str:
    """``92.53 [92.36, 92.69]``."""
    if interval is None or interval.value is None:
        return EMPTY
    value = number(interval.value, decimals)
    if interval.lo is None:
        return value
    return f"{value} [{number(interval.lo, decimals)}, {number(interval.hi, decimals)}]"


def findings(evidence: Evidence, summary: Summary) -> list[str]:
    """The main results in sentences, computed from the same numbers as the tables."""
    ours = summary.methods.get(OURS)
    if ours is None:
        return [f"{OURS} has no cell in this study."]
    found = [f"{OURS} reaches {with_interval(ours.accuracy, 2)} % top-1 at {number(ours.macs_ratio, 3)}x MACs."]
    if ours.versus_reference:
        found.append(f"That is {with_interval(ours.versus_reference.interval, 2)} points against {REFERENCE}, which "
                     f"went through the same recovery (dense checkpoint: "
                     f"{number(evidence.reference['top1_test'], 2)} %).")
    if ours.speedup:
        found.append(f"At batch {THROUGHPUT_BATCH} it runs {with_interval(ours.speedup, 2)} times as fast as the dense "
                     "network.")
    if summary.leads:
        ahead = [name for name, lead in summary.leads.items()
                 if lead.interval.value > 0 and summary.adjusted[name] < evidence.alpha]
        found.append(f"It is ahead of {len(ahead)} of {len(summary.leads)} rivals at adjusted p < {evidence.alpha:g}.")
    return found


def setup(evidence: Evidence) -> list[tuple[str, str]]:
    """Study, dense network and fingerprint as pairs of label and text."""
    study, dense, reference = evidence.params.study, evidence.dense, evidence.reference
    accuracy = f"{number(reference['top1_test'], 2)} % test, {number(reference['top1_validation'], 2)} % validation"
    pairs = [("Network, data set", f"{study.network}, {study.dataset}"), ("Budget", budget(evidence)),
             ("Seeds", ", ".join(map(str, study.seeds))), ("Dense network, top-1", accuracy),
             ("Dense network, size", f"{reference['macs']:,} MACs, {reference['params']:,} parameters")]
    if "epochs" in dense:
        pairs.append(("Dense training", f"{dense['epochs']} epochs"))
    pairs.append(("Platform", evidence.platform or "no timings"))
    return pairs + [(key, _text(value)) for key, value in sorted(evidence.fingerprint.items()) if value is not None]


def recipe(evidence: Evidence) -> list[tuple[str, str]]:
    """The finetune section of params."""
    flat = evidence.params.finetune.model_dump()
    flat |= {f"distillation.{key}": value for key, value in flat.pop("distillation").items()}
    return [(key, _text(value)) for key, value in flat.items()]


def limitations(evidence: Evidence, summary: Summary) -> list[str]:
    """What the study cannot show; every number is computed from it."""
    images = next(iter(evidence.cells.values()))["test_images"]
    share = evidence.reference["top1_test"] / 100
    error = 100 * math.sqrt(share * (1 - share) / images)
    timings = (f"Timings belong to one platform ({evidence.platform}) and one mode, with one process per cell; the "
               "dense network is timed in the same process." if evidence.timings else "Nothing is timed yet.")
    lines = LIMITS.format(n=summary.n, wilcoxon=wilcoxon_note(evidence, summary), images=f"{images:,}", error=error,
                          recovery=recovery_in_words(evidence), budget=budget(evidence), timings=timings).splitlines()
    return lines if evidence.params.pretrain.source == "train" else [FOREIGN, *lines]


def _text(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _charts(evidence: Evidence, figures: list[ReportFigure]) -> dict[str, dict]:
    """Chart by the name of its place on the page."""
    return {figure.name: figure.chart for figure in figures if figure.chart} | {"explorer": Charts(evidence).explorer()}


def _in_script(content: dict) -> Markup:
    """JSON that cannot end the element around it."""
    return Markup(json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def _images(figures: list[ReportFigure]) -> dict[str, str]:
    """Figure name to a data URI: as an image, so that the identifiers inside two SVG files cannot collide."""
    return {figure.name: "data:image/svg+xml;base64," + base64.b64encode(figure.files["svg"]).decode()
            for figure in figures if figure.files}


def _claim(claim: Claim, tables: dict[str, Table]) -> dict:
    unmeasured = claim.verdict.startswith(NOT_MEASURED)
    return {"claim": claim.claim, "statement": claim.statement, "goal": claim.wanted,
            "kind": {HOLDS: "holds", FAILS: "fails"}.get(claim.verdict, "unmeasured"),
            "verdict": NOT_MEASURED.rstrip(": ") if unmeasured else claim.verdict,
            "behind": BEHIND[claim.claim] if BEHIND[claim.claim] in tables and not unmeasured else "",
            "measured": with_interval(claim.interval, 2), "unit": "" if unmeasured else claim.unit,
            "how": claim.verdict.removeprefix(NOT_MEASURED) if unmeasured else claim.conditions}


def _t1(method: MethodSummary, summary: Summary) -> list[str]:
    difference = method.versus_reference
    p_value = Column("p_adjusted", "", 6, 3).read(summary.adjusted.get(method.method))
    return [method.method, str(method.n), with_interval(method.accuracy, 2), number(method.before_recovery, 2),
            number(method.macs_ratio, 3), number(method.params_ratio, 3), with_interval(method.latency, 3),
            number(method.throughput, 0), number(method.energy, 4), with_interval(method.speedup, 2),
            with_interval(difference.interval if difference else None, 2), p_value]

"""Writes a study's report: everything is computed before the first file is touched."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hobs_rspar.config import Params
from hobs_rspar.evidence import (
    ablation,
    claims,
    cost,
    experiment_plan,
    latency,
    leads,
    metrics,
    page,
    published,
    recovery_tables,
    speed,
    stability,
    tables,
    timings,
)
from hobs_rspar.evidence.cells import Evidence, read
from hobs_rspar.evidence.figures import draw_all
from hobs_rspar.evidence.summary import Summary, summarise
from hobs_rspar.evidence.table_formats import files

FOLDERS = ("tables", "figures", "plots")


def write(params: Params) -> str:
    """Writes ``reports/<study>/``; returns the closing line.

    Raises:
        UserError: see ``cells.read``.
    """
    evidence = read(params)
    _warn(evidence)
    folder = evidence.paths.report
    _replace(folder, contents(evidence, summarise(evidence)))
    return (f"report {params.study.name}: {len(evidence.cells)} of {len(params.cells)} cells, tables and figures in "
            f"{folder}/, open {folder}/index.html")


def contents(evidence: Evidence, summary: Summary) -> dict[str, bytes]:
    """Every file of the report: path below the report's folder to content."""
    found = claims.claims(evidence, summary)
    own = (claims.table(evidence, summary, found), tables.t1(evidence, summary), leads.paired(evidence, summary),
           recovery_tables.recovery(evidence, summary), cost.equal_cost(evidence, summary),
           published.beside(evidence, summary),
           latency.foretold(evidence, summary), recovery_tables.repair(evidence, summary),
           timings.t5(evidence, summary), timings.t6(evidence, summary), speed.modes(evidence), speed.t14(evidence),
           speed.t14_layers(evidence), ablation.t8(evidence, summary),
           tables.t10(evidence, summary))
    every = (*own, *claims.tables_of(evidence), stability.t12(evidence, summary), stability.t13(evidence, summary),
             tables.t16(evidence, summary))
    shown = {table.name: table for table in every if table}
    shown["plan"] = experiment_plan.where(shown)
    figures = draw_all(evidence, summary)
    texts = {f"tables/{name}": text for table in shown.values() for name, text in files(table).items()}
    texts |= {"tables/conditions.json": _conditions(evidence, summary),
              "metrics.json": metrics.metrics(evidence, summary),
              "plots/accuracy.csv": metrics.accuracy_by_cell(evidence),
              "plots/recovery.csv": metrics.recovery_by_epoch(evidence),
              "index.html": page.render(evidence, summary, page.Parts(shown, found, figures))}
    return {name: text.encode() for name, text in texts.items()} | {
        f"figures/{figure.name}.{kind}": data for figure in figures for kind, data in figure.files.items()}


def _conditions(evidence: Evidence, summary: Summary) -> str:
    """What a reader must know beside T1, for the README."""
    how = tables.conditions(evidence).removeprefix("Conditions: ")
    missing = f"; {len(evidence.missing)} of {len(evidence.params.cells)} cells missing" if evidence.missing else ""
    content = {"line": f"{tables.subject(evidence)}, {summary.n}{missing}; {how}.",
               "confidence": f"{100 * evidence.params.report.confidence:g} %"}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _replace(folder: Path, found: dict[str, bytes]) -> None:
    """Writes all files and removes those of an earlier report that this one does not have."""
    for name, data in found.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    old = [file for part in FOLDERS if (folder / part).is_dir() for file in (folder / part).iterdir() if file.is_file()]
    for file in old:
        if file.relative_to(folder).as_posix() not in found:
            file.unlink()


def _warn(evidence: Evidence) -> None:
    total = len(evidence.params.cells)
    if evidence.missing:
        print(f"warning: {len(evidence.missing)} of {total} cells are missing: {', '.join(evidence.missing)}; "
              "'dvc repro' computes them", file=sys.stderr)
    if stale := evidence.stale:
        print("warning: of earlier networks than those in artifacts/: "
              f"{', '.join(stale)}; 'dvc repro' measures them anew", file=sys.stderr)
    if evidence.untimed:
        print(f"warning: no timing of the present network on {evidence.platform or 'any platform'} for: "
              f"{', '.join(evidence.untimed)}; 'dvc repro' measures them", file=sys.stderr)
    if evidence.leftover:
        print("warning: not named by params.yaml and not used: " + ", ".join(map(str, evidence.leftover)),
              file=sys.stderr)

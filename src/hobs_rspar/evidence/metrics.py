"""metrics.json for ``dvc metrics diff`` and the small files of plots/ for ``dvc plots diff``."""

from __future__ import annotations

import json
import statistics as plain

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.summary import MethodSummary, Summary
from hobs_rspar.evidence.table_formats import csv_text


def metrics(evidence: Evidence, summary: Summary) -> str:
    """metrics.json: a few numbers per method, rounded to what the seeds' spread lets a reader compare."""
    content = {"dense": {"top1": round(evidence.reference["top1_test"], 3)},
               **{name: _row(method) for name, method in summary.methods.items()},
               "study": {"cells": len(evidence.cells), "missing": evidence.missing}}
    return json.dumps(content, indent=2) + "\n"


def accuracy_by_cell(evidence: Evidence) -> str:
    """``cell, method, seed, top1``: test accuracy of every cell, percent."""
    rows = [[key, cell["method"], cell["seed"], round(cell["accuracy"]["test"], 4)]
            for key, cell in evidence.cells.items()]
    return csv_text(["cell", "method", "seed", "top1"], rows)


def recovery_by_epoch(evidence: Evidence) -> str:
    """``method, images, validation_top1``: before and after every epoch of recovery, mean over seeds, percent."""
    rows = [[method, round(images), round(top1, 4)] for method in evidence.methods
            for images, top1 in zip(*mean_recovery(evidence, method), strict=True)]
    return csv_text(["method", "images", "validation_top1"], rows)


def mean_recovery(evidence: Evidence, method: str) -> tuple[list[float], list[float]]:
    """Images seen and validation accuracy (percent, mean over seeds), starting before the first step of recovery."""
    histories = [[{"images": 0, "validation_top1": cell["accuracy"]["after_repair"]}, *cell["history"]]
                 for cell in evidence.of(method)]
    steps = list(zip(*histories, strict=False))
    return ([plain.fmean(point["images"] for point in step) for step in steps],
            [plain.fmean(point["validation_top1"] for point in step) for step in steps])


def _row(method: MethodSummary) -> dict:
    difference = method.versus_reference
    return {"top1": round(method.accuracy.value, 3), "macs_ratio": round(method.macs_ratio, 4),
            "speedup": round(method.speedup.value, 2) if method.speedup else None,
            "delta_vs_dense": round(difference.interval.value, 3) if difference else None}

"""Published figures beside ours, where a paper has the study's network and data set; the conditions differ."""

from __future__ import annotations

from typing import NamedTuple

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.summary import Summary
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject


class Figure(NamedTuple):
    """A quotation.

    Attributes:
        dense: top-1 of the authors' dense network in percent; ``pruned`` after their recovery.
        macs: kept fraction of the MACs; None where the paper counts something else.
    """

    method: str
    network: str
    dataset: str
    dense: float
    pruned: float
    macs: float | None
    source: str
    training: str


FIGURES = (
    Figure("depgraph", "resnet56", "cifar10", 93.53, 93.77, 1 / 2.11, "Fang et al., CVPR 2023",
           "100 epochs of sparse training, 100 of fine-tuning; the best epoch on test images"),
    Figure("depgraph", "resnet56", "cifar10", 93.53, 93.46, 1 / 2.11, "Fang et al., CVPR 2023",
           "without sparse training"),
    Figure("jtp", "resnet56", "cifar10", 93.41, 93.86, 0.5, "RLAL, CVPR 2024",
           "200 epochs jointly from random weights, then fine-tuning by the same schedule"),
    Figure("structalign", "resnet56", "cifar10", 93.49, 93.81, 0.48, "SANP, ICCV 2023",
           "training with gates, then fine-tuning by similar settings"),
    Figure("udfc", "resnet56", "cifar10", 93.88, 90.33, None, "UDFC, ICCV 2023",
           "no data and no training; 30 % of the parameters removed, the rest in 4 bits"),
)
COLUMNS = (
    Column("method", "Method"),
    Column("published_dense", "Published: dense (%)", 2),
    Column("published_pruned", "Published: pruned (%)", 2),
    Column("published_change", "Published: change (points)", 2),
    Column("published_macs", "Published: MACs kept", 2),
    Column("training", "Published: training", wrap=0.2),
    Column("source", "Source", wrap=0.12),
    Column("dense", "Here: dense (%)", 2),
    Column("pruned", "Here: pruned (%)", 2),
    Column("change", "Here: change (points)", 2),
    Column("macs", "Here: MACs kept", 2),
    Column("images", "Here: images trained on"),
)


def beside(evidence: Evidence, summary: Summary) -> Table | None:
    """A row per published figure of a method of the study; None where there is none."""
    study = evidence.params.study
    rows = [_row(evidence, summary, figure) for figure in FIGURES
            if (figure.network, figure.dataset) == (study.network, study.dataset) and figure.method in summary.methods]
    if not rows:
        return None
    note = ("Published figures are quotations, at the authors' own budget, from their own dense network and after "
            "their own training; they are no expectation for the figures here. Here: test images, mean over seeds; "
            "the dense checkpoint as it is, before the recovery that all methods get; images trained on are those of "
            f"recovery and of what a method trains before it. {conditions(evidence)}.")
    return Table("published", f"Published figures beside ours: {subject(evidence)}, {summary.n}", note, COLUMNS, rows)


def _row(evidence: Evidence, summary: Summary, figure: Figure) -> dict:
    method, dense = summary.methods[figure.method], evidence.reference["top1_test"]
    images = summary.recovery[-1].seen + method.extra_training
    return {"method": figure.method, "published_dense": figure.dense, "published_pruned": figure.pruned,
            "published_change": figure.pruned - figure.dense, "published_macs": figure.macs,
            "training": figure.training, "source": figure.source, "dense": dense, "pruned": method.accuracy.value,
            "change": method.accuracy.value - dense, "macs": method.macs_ratio, "images": round(images)}

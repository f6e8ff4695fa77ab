"""Two revisions of a study against each other: every method paired by seed."""

from __future__ import annotations

import statistics as plain
from dataclasses import dataclass
from typing import Any

from hobs_rspar.errors import UserError
from hobs_rspar.evidence.pairing import pairs
from hobs_rspar.evidence.statistics import Difference, holm, paired_difference
from hobs_rspar.evidence.summary import THROUGHPUT_BATCH, timed_batch
from hobs_rspar.evidence.table_formats import Column, Table

MEASURES = {"top1": ("Top-1, test (%)", "test"), "before": ("Before recovery (%)", "after_repair")}


@dataclass(frozen=True)
class Side:
    """One revision of a study.

    Attributes:
        name: as the user wrote it.
        params: its params.yaml.
        cells: cell key to the content of its file.
        timings: platform to cell key to the content of its file.
    """

    name: str
    params: dict[str, Any]
    cells: dict[str, dict]
    timings: dict[str, dict[str, dict]]

    @property
    def methods(self) -> list[str]:
        """With a cell, in the order of the study."""
        seen = {cell["method"] for cell in self.cells.values()}
        return [method for method in self.params["study"]["methods"] if method in seen]

    def by_seed(self, method: str, measure: str) -> dict[int, float]:
        """An accuracy in percent by seed."""
        return {cell["seed"]: cell["accuracy"][measure] for cell in self.cells.values() if cell["method"] == method}

    def speedup(self, method: str, platform: str | None) -> float | None:
        """Dense time / pruned time at batch 64 on a platform, median over cells."""
        timings = [timing for key, timing in self.timings.get(platform, {}).items()
                   if key in self.cells and self.cells[key]["method"] == method]
        entries = timed_batch(timings, THROUGHPUT_BATCH)
        return plain.median(entry["speedup"] for entry in entries) if entries else None

    def macs(self, method: str) -> float:
        return plain.fmean(cell["plan"]["macs_ratio"] for cell in self.cells.values() if cell["method"] == method)


def compared(first: Side, second: Side) -> Table:
    """A row per method that both sides have on at least two common seeds.

    Raises:
        UserError: there is no such method.
    """
    common = [method for method in first.methods if method in second.methods]
    found = {method: {key: _difference(first, second, method, measure) for key, (_, measure) in MEASURES.items()}
             for method in common}
    found = {method: differences for method, differences in found.items() if differences["top1"]}
    if not found:
        raise UserError(f"{first.name} and {second.name} share no method with at least two seeds, so that nothing can "
                        f"be paired; {first.name} has {', '.join(first.methods) or 'no cells'}, {second.name} has "
                        f"{', '.join(second.methods) or 'no cells'}")
    adjusted = holm({method: differences["top1"].p_value for method, differences in found.items()})
    platform = next((name for name in first.timings if name in second.timings), None)
    rows = [_row(first, second, method, differences, platform) | {"p_adjusted": adjusted[method]}
            for method, differences in found.items()]
    note = (f"A is {first.name}, B is {second.name}. Differences: B minus A, paired by seed, with their 95 % interval "
            "(paired t below 10 seeds, paired bootstrap from there on). Adjusted p: paired t-test on test accuracy, "
            f"Holm over the methods. Before recovery: validation images. Speedup: batch {THROUGHPUT_BATCH}"
            + (f" on {platform}." if platform else "; no platform timed both."))
    return Table("comparison", f"{first.name} (A) and {second.name} (B)", note, _columns(), rows)


def _columns() -> tuple[Column, ...]:
    accuracies = [column for key, (heading, _) in MEASURES.items() for column in (
        Column(f"{key}_a", f"{heading}: A", 4, 2), Column(f"{key}_b", "B", 4, 2),
        Column(f"{key}_difference", "B − A", 4, 2), Column(f"{key}_lo", "95 % from", 4, 2),
        Column(f"{key}_hi", "to", 4, 2))]
    return (Column("method", "Method"), Column("n", "Pairs"), *accuracies, Column("p_adjusted", "Adjusted p", 6, 3),
            Column("macs_a", "MACs kept: A", 4, 3), Column("macs_b", "B", 4, 3),
            Column("speedup_a", "Speedup: A", 4, 2), Column("speedup_b", "B", 4, 2))


def _difference(first: Side, second: Side, method: str, measure: str) -> Difference | None:
    paired = pairs(second.by_seed(method, measure), first.by_seed(method, measure))
    return paired_difference(*paired) if len(paired[0]) > 1 else None


def _row(first: Side, second: Side, method: str, differences: dict[str, Difference], platform: str | None) -> dict:
    row: dict = {"method": method, "n": differences["top1"].n}
    for key, (_, measure) in MEASURES.items():
        after, before = pairs(second.by_seed(method, measure), first.by_seed(method, measure))
        interval = differences[key].interval
        row |= {f"{key}_a": plain.fmean(before), f"{key}_b": plain.fmean(after), f"{key}_difference": interval.value,
                f"{key}_lo": interval.lo, f"{key}_hi": interval.hi}
    for side, letter in ((first, "a"), (second, "b")):
        row |= {f"macs_{letter}": side.macs(method), f"speedup_{letter}": side.speedup(method, platform)}
    return row

"""T5 and T6: the timings behind T1, for every platform that measured these networks and for every batch size."""

from __future__ import annotations

import statistics as plain

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.summary import (
    LATENCY_BATCH,
    THROUGHPUT_BATCH,
    Summary,
    at_usual_pace,
    speed_interval,
    timed_batch,
)
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import conditions, subject

T5_COLUMNS = (
    Column("platform", "Platform"),
    Column("device", "Device"),
    Column("threads", "Threads"),
    Column("torch", "PyTorch"),
    Column("method", "Method"),
    Column("n", "n"),
    Column("latency_ms", f"Latency, batch {LATENCY_BATCH} (ms)", 4, 3),
    Column("throughput", f"Throughput, batch {THROUGHPUT_BATCH} (images/s)", 2, 0),
    Column("speedup", f"Speedup, batch {THROUGHPUT_BATCH}", 4, 2),
    Column("speedup_lo", "95 % from", 4, 2),
    Column("speedup_hi", "to", 4, 2),
    Column("energy_j", "Energy (J/image)", 6, 4),
)
T6_COLUMNS = (
    Column("method", "Method"),
    Column("batch", "Batch"),
    Column("n", "n"),
    Column("dense_ms", "Dense: p50 (ms)", 4, 2),
    Column("p50_ms", "Pruned: p50 (ms)", 4, 2),
    Column("p90_ms", "Pruned: p90 (ms)", 4, 2),
    Column("p99_ms", "Pruned: p99 (ms)", 4, 2),
    Column("throughput", "Pruned: images/s", 2, 0),
    Column("speedup", "Speedup", 4, 2),
    Column("speedup_lo", "95 % from", 4, 2),
    Column("speedup_hi", "to", 4, 2),
    Column("bound", "Speedup if compute-bound", 4, 2),
)


def t5(evidence: Evidence, summary: Summary) -> Table | None:
    """A row per platform and method; None where nothing was timed."""
    everywhere = {evidence.platform: evidence.timings} | evidence.elsewhere
    rows = [_platform_row(evidence, platform, method, timings)
            for platform, timings in everywhere.items() for method in summary.methods]
    rows = [row for row in rows if row["n"]]
    if not rows:
        return None
    note = ("One row per platform that timed the present networks and method; medians over cells, intervals by "
            "bootstrap over cells. Platforms are never mixed in one comparison; T1 shows the first. Another machine "
            "adds its rows by 'python pipeline/benchmark.py METHOD SEED'. Speedup: dense time / pruned time on the "
            "same platform, measured in turns; latency and throughput are such a ratio at the dense median.")
    return Table("T5", f"T5. Platforms: {subject(evidence)}, {summary.n}", note, T5_COLUMNS, rows)


def t6(evidence: Evidence, summary: Summary) -> Table | None:
    """A row per method and batch size; None where nothing was timed."""
    rows = [_batch_row(evidence, method, batch) for method in summary.methods
            for batch in sorted({batch for timing in evidence.timed(method) for batch in timing["batches"]}, key=int)]
    if not rows:
        return None
    note = (f"Medians over cells; intervals by bootstrap over cells. If compute-bound: dense MACs / pruned MACs, which "
            f"memory traffic and fixed costs of a call keep out of reach. {conditions(evidence)}.")
    return Table("T6", f"T6. Batch sizes: {subject(evidence)}, {summary.n}", note, T6_COLUMNS, rows)


def _platform_row(evidence: Evidence, platform: str, method: str, everything: dict[str, dict]) -> dict:
    timings = [everything[cell["cell"]] for cell in evidence.of(method) if cell["cell"] in everything]
    row = {"platform": platform, "method": method, "n": len(timings)}
    if not timings:
        return row
    seen = timings[0]["fingerprint"]
    energy = [timing["energy"]["pruned_j"] for timing in timings if timing.get("energy")]
    return row | {"device": seen["device"], "threads": seen["threads"], "torch": seen["torch"],
                  "latency_ms": _median(at_usual_pace(timings, LATENCY_BATCH, "p50_ms", everything)),
                  "throughput": _median(at_usual_pace(timings, THROUGHPUT_BATCH, "throughput", everything)),
                  "energy_j": _median(energy)} | _speedup(evidence, timings, THROUGHPUT_BATCH)


def _batch_row(evidence: Evidence, method: str, batch: str) -> dict:
    timings = evidence.timed(method)
    entries = timed_batch(timings, batch)
    pruned = {key: _median(entry["pruned"][key] for entry in entries)
              for key in ("p50_ms", "p90_ms", "p99_ms", "throughput")}
    kept = plain.fmean(cell["plan"]["macs_ratio"] for cell in evidence.of(method))
    return {"method": method, "batch": int(batch), "n": len(entries), "bound": 1 / kept,
            "dense_ms": _median(entry["dense"]["p50_ms"] for entry in entries)} | pruned | _speedup(evidence, timings,
                                                                                                    batch)


def _speedup(evidence: Evidence, timings: list[dict], batch: str) -> dict:
    found = speed_interval(evidence, timings, batch)
    return {"speedup": found.value, "speedup_lo": found.lo, "speedup_hi": found.hi} if found else {}


def _median(values) -> float | None:
    values = list(values)
    return plain.median(values) if values else None

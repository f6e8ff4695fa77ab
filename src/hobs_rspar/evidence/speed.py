"""T6 in every mode and T14: what the ``speed`` stage found of single cells."""

from __future__ import annotations

from hobs_rspar.evidence.cells import Evidence
from hobs_rspar.evidence.table_formats import Column, Table
from hobs_rspar.evidence.tables import subject

MODES = (
    Column("method", "Method"),
    Column("run", "Run"),
    Column("dtype", "Format"),
    Column("batchnorm", "Batch norms"),
    Column("batch", "Batch"),
    Column("dense_p50_ms", "Dense: p50 (ms)", 4, 3),
    Column("pruned_p50_ms", "Pruned: p50 (ms)", 4, 3),
    Column("pruned_p90_ms", "p90 (ms)", 4, 3),
    Column("pruned_p99_ms", "p99 (ms)", 4, 3),
    Column("throughput", "Pruned: images/s", 2, 0),
    Column("speedup", "Speedup", 4, 2),
    Column("speedup_lo", "95 % from", 4, 2),
    Column("speedup_hi", "to", 4, 2),
    Column("reason", "Where not measured", wrap=0.15),
)
KINDS = (
    Column("network", "Network"),
    Column("operator", "Operator"),
    Column("calls", "Calls"),
    Column("ms", "Time (ms)", 4, 3),
    Column("share", "Share of the pass (%)", 4, 1),
    Column("gmacs", "GMAC/s", 4, 2),
    Column("of_peak", "Of the arithmetic ceiling (%)", 4, 1),
    Column("gbytes", "GB/s", 4, 2),
    Column("of_bandwidth", "Of the bandwidth ceiling (%)", 4, 1),
)
LAYERS = (
    Column("network", "Network"),
    Column("layer", "Layer"),
    Column("shape", "Output"),
    Column("ms", "Time (ms)", 4, 3),
    Column("intensity", "MACs per byte", 4, 2),
    Column("gmacs", "GMAC/s", 4, 2),
    Column("roof", "Roofline (GMAC/s)", 4, 2),
    Column("of_roof", "Of it (%)", 4, 1),
    Column("bound", "Bound by"),
)


def modes(evidence: Evidence) -> Table | None:
    """A row per cell and mode; None where no cell was measured in all modes."""
    if not evidence.speed:
        return None
    rows = [_mode_row(record["method"], row) for record in evidence.speed.values() for row in record["modes"]]
    first = next(iter(evidence.speed.values()))
    processes = max((row["processes"] for row in first["modes"] if not row["reason"]), default=0)
    note = (f"{_where(first)}. Both networks in the same mode, in turns, in {processes} fresh processes; percentiles "
            "over all calls; speedup: dense time / pruned time, median over processes, with the bootstrap interval "
            "over processes and the rounds within them. Folded: batch norms are part of the convolutions before them. "
            f"Cells: {', '.join(evidence.speed)}.")
    return Table("T6_modes", f"T6. Every mode: {subject(evidence)}, n = 1 network per method", note, MODES, rows)


def t14(evidence: Evidence) -> Table | None:
    """Time per kind of operator, before and after pruning; None where nothing was profiled."""
    rows = [row for name, calls in _networks(evidence) for row in _by_kind(name, calls, ceilings(evidence))]
    note = (f"{_ceilings(evidence)} Bytes: of the tensors that an operator reads and writes; caches may save some."
            if rows else "")
    return Table("T14", f"T14. Time per operator: {subject(evidence)}", note, KINDS, rows) if rows else None


def t14_layers(evidence: Evidence) -> Table | None:
    """Every convolution against the roofline; None where nothing was profiled."""
    rows = [row for name, calls in _networks(evidence) for row in _by_layer(name, calls, ceilings(evidence))]
    note = (f"{_ceilings(evidence)} Roofline: the lower of arithmetic and of bandwidth times MACs per byte; a layer "
            "above it found its data in a cache." if rows else "")
    title = f"T14. Convolutions against the roofline: {subject(evidence)}"
    return Table("T14_layers", title, note, LAYERS, rows) if rows else None


def ceilings(evidence: Evidence) -> dict[str, float]:
    """Multiply-accumulates/s and bytes/s that the machine was seen to do at most, beside any of the cells."""
    seen = [record["ceilings"] for record in evidence.speed.values()]
    return {key: max(found[key] for found in seen) for key in ("macs", "bytes")}


def roof(limits: dict[str, float], intensity: float) -> float:
    """Multiply-accumulates/s that an operator with so many of them per byte can reach at most."""
    return min(limits["macs"], intensity * limits["bytes"])


def _mode_row(method: str, row: dict) -> dict:
    median = row.get("pruned_p50_ms")
    return {**row, "method": method, "throughput": 1e3 * row["batch"] / median if median else None}


def _networks(evidence: Evidence) -> list[tuple[str, list[dict]]]:
    """Name and operators of every profiled network: the dense one once, then the pruned ones."""
    records = list(evidence.speed.values())
    return [("dense", record["operators"]["dense"]) for record in records[:1]] + [
        (record["method"], record["operators"][record["method"]]) for record in records]


def _where(record: dict) -> str:
    seen = record["fingerprint"]
    return (f"{seen['device']}, {seen['threads']} thread{'s' * (seen['threads'] != 1)}, torch {seen['torch']}, "
            "channels_last")


def _ceilings(evidence: Evidence) -> str:
    record, limits = next(iter(evidence.speed.values())), ceilings(evidence)
    return (f"{_where(record)}, eager fp32, batch {record['operators_batch']}; median over rounds in which the "
            f"networks take turns. Ceilings, measured there: {limits['macs'] / 1e9:.4g} GMAC/s of a large "
            f"product, {limits['bytes'] / 1e9:.4g} GB/s of a large copy, the most of any cell.")


def _by_kind(name: str, calls: list[dict], limits: dict[str, float]) -> list[dict]:
    """One row per kind of operator, the longest first."""
    total = sum(call["milliseconds"] for call in calls)
    kinds: dict[str, list[dict]] = {}
    for call in calls:
        kinds.setdefault(call["kind"], []).append(call)
    rows = []
    for kind, own in sorted(kinds.items(), key=lambda item: -sum(call["milliseconds"] for call in item[1])):
        ms = sum(call["milliseconds"] for call in own)
        macs, moved = (sum(call[key] for call in own) / (ms / 1e3) for key in ("macs", "bytes"))
        rows.append({"network": name, "operator": kind, "calls": len(own), "ms": ms, "share": 100 * ms / total,
                     "gmacs": macs / 1e9 if macs else None, "of_peak": 100 * macs / limits["macs"] if macs else None,
                     "gbytes": moved / 1e9, "of_bandwidth": 100 * moved / limits["bytes"]})
    return rows


def _by_layer(name: str, calls: list[dict], limits: dict[str, float]) -> list[dict]:
    """One row per convolution, in order of execution."""
    rows = []
    for call in calls:
        if call["kind"] == "convolution":
            intensity, speed = call["macs"] / call["bytes"], call["macs"] / (call["milliseconds"] / 1e3)
            limit = roof(limits, intensity)
            rows.append({"network": name, "layer": call["layer"], "shape": "x".join(map(str, call["shape"][1:])),
                         "ms": call["milliseconds"], "intensity": intensity, "gmacs": speed / 1e9, "roof": limit / 1e9,
                         "of_roof": 100 * speed / limit,
                         "bound": "arithmetic" if limit == limits["macs"] else "memory"})
    return rows

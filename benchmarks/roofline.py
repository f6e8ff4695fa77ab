"""Table T14, time per operator and what the machine can do, for dense and pruned: ``python benchmarks/roofline.py``.

Of the dense network of the study of params.yaml, and of the recovered networks of ``hobs_rspar`` and of the best rival
at the first seed; a minute on an idle machine.
"""

import json
import time
from pathlib import Path

import torch
from _bench import publish_tables
from _experiment import run

from hobs_rspar import checkpoint, config
from hobs_rspar.device import resolve_device
from hobs_rspar.errors import UserError
from hobs_rspar.evidence.pairing import OURS, REFERENCE
from hobs_rspar.hardware import timing
from hobs_rspar.hardware.operators import Call, Ceilings, profile
from hobs_rspar.paths import Paths

BATCH = 64
KINDS = [["network", "Network"], ["operator", "Operator"], ["calls", "Calls"], ["ms", "Time (ms)"],
         ["share", "Share of the pass (%)"], ["gmacs", "GMAC/s"], ["of_peak", "Of the arithmetic ceiling (%)"],
         ["gbytes", "GB/s"], ["of_bandwidth", "Of the bandwidth ceiling (%)"]]
LAYERS = [["network", "Network"], ["layer", "Layer"], ["shape", "Output"], ["ms", "Time (ms)"],
          ["intensity", "MACs per byte"], ["gmacs", "GMAC/s"], ["roof", "Roofline (GMAC/s)"], ["of_roof", "Of it (%)"],
          ["bound", "Bound by"]]


def main() -> None:
    started, params = time.perf_counter(), config.load()
    device = resolve_device(params.device)
    paths, threads = Paths.of(params.study), params.benchmark.threads
    torch.set_num_threads(threads)
    found = networks(params, paths)
    loaded = [timing.prepared(checkpoint.load(path), device) for path in found.values()]
    _, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
    x = timing.example((BATCH, *spec.example().shape[1:]), device)
    profiles = dict(zip(found, profile(loaded, x)))
    ceilings = Ceilings.measured(device)
    subject = (f"{params.study.network} on {params.study.dataset}, batch {BATCH}, eager fp32, {device.type}, {threads} "
               f"thread{'s' * (threads > 1)}")
    note = (f"Median over rounds in which the networks take turns. Ceilings, measured here: {ceilings.macs / 1e9:.4g} "
            f"GMAC/s of a large matrix product, {ceilings.bytes / 1e9:.4g} GB/s of a large copy.")
    tables = [{"name": "T14", "title": f"T14. Time per operator: {subject}", "columns": KINDS,
               "note": f"{note} Bytes: of the tensors that an operator reads and writes; caches may save some.",
               "rows": [row for name, calls in profiles.items() for row in by_kind(name, calls, ceilings)]},
              {"name": "T14_layers", "title": f"T14. Convolutions against the roofline: {subject}", "columns": LAYERS,
               "note": f"{note} Roofline: the lower of arithmetic and of bandwidth times MACs per byte; a layer above "
                       "it found its data in a cache.",
               "rows": [row for name, calls in profiles.items() for row in by_layer(name, calls, ceilings)]}]
    publish_tables(params, subject, started, tables)


def networks(params: config.Params, paths: Paths) -> dict[str, Path]:
    """Name to file: the dense network, ours, and the rival with the best validation accuracy at the first seed.

    Raises:
        UserError: ours has not been recovered.
    """
    seed = params.study.seeds[0]
    cells = {method: paths.cell(f"{method}-{seed}") for method in params.study.methods}
    there = {method: json.loads((folder / "recovery.json").read_text())["top1_validation"]
             for method, folder in cells.items() if (folder / "recovered.safetensors").is_file()}
    if OURS not in there:
        raise UserError(f"{paths.cell(f'{OURS}-{seed}')}/recovered.safetensors is missing; 'dvc repro -s "
                        f"finetune@{OURS}-{seed}' or 'make repro' makes it")
    rivals = [method for method in there if method != REFERENCE and not method.startswith("hobs_")]
    chosen = [OURS, *sorted(rivals, key=lambda method: -there[method])[:1]]
    return {"dense": paths.dense / "dense.safetensors"} | {
        method: cells[method] / "recovered.safetensors" for method in chosen}


def by_kind(network: str, calls: list[Call], ceilings: Ceilings) -> list[dict]:
    """One row per kind of operator, the longest first."""
    total = sum(call.milliseconds for call in calls)
    kinds = {kind: [call for call in calls if call.kind == kind] for kind in dict.fromkeys(call.kind for call in calls)}
    rows = []
    for kind, own in sorted(kinds.items(), key=lambda item: -sum(call.milliseconds for call in item[1])):
        ms = sum(call.milliseconds for call in own)
        macs, moved = (sum(getattr(call, name) for call in own) / (ms / 1e3) for name in ("macs", "bytes"))
        rows.append({"network": network, "operator": kind, "calls": len(own), "ms": round(ms, 3),
                     "share": round(100 * ms / total, 1), "gmacs": round(macs / 1e9, 2) if macs else None,
                     "of_peak": round(100 * macs / ceilings.macs, 1) if macs else None,
                     "gbytes": round(moved / 1e9, 2), "of_bandwidth": round(100 * moved / ceilings.bytes, 1)})
    return rows


def by_layer(network: str, calls: list[Call], ceilings: Ceilings) -> list[dict]:
    """One row per convolution, in order of execution."""
    rows = []
    for call in calls:
        if call.kind == "convolution":
            intensity, speed = call.macs / call.bytes, call.macs / (call.milliseconds / 1e3)
            roof = ceilings.roof(intensity)
            rows.append({"network": network, "layer": call.layer, "shape": "x".join(map(str, call.shape[1:])),
                         "ms": round(call.milliseconds, 3), "intensity": round(intensity, 2),
                         "gmacs": round(speed / 1e9, 2), "roof": round(roof / 1e9, 2),
                         "of_roof": round(100 * speed / roof, 1),
                         "bound": "arithmetic" if roof == ceilings.macs else "memory"})
    return rows


if __name__ == "__main__":
    run(main)

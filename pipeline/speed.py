"""Stage speed: a cell's recovered network against the dense one in every mode, and operator by operator.

python pipeline/speed.py CELL        for example hobs_rspar-42
"""

import time
from dataclasses import asdict

import torch

from _cell import named_cell
from _stage import run
from hobs_rspar import checkpoint, config
from hobs_rspar.device import resolve_device
from hobs_rspar.hardware import modes, platform, timing
from hobs_rspar.hardware.operators import Ceilings, profile
from hobs_rspar.hardware.record import write_json
from hobs_rspar.progress import bar

BATCH = 64  # images of the pass whose operators are timed


def main() -> None:
    started, params = time.perf_counter(), config.load()
    files, options, threads = named_cell(params), params.speed, params.benchmark.threads
    cell, device = files.name, resolve_device(params.device)
    fingerprint = platform.fingerprint(device, threads)
    here = platform.require_platform(params.benchmark.platform, platform.slug(fingerprint))
    files.require()
    dense, spec = checkpoint.load_with_spec(files.dense)
    pruned, image = checkpoint.load(files.recovered), tuple(spec.example().shape[1:])
    every = modes.modes(options.batch_sizes, options.compiled, device)
    plan = modes.Plan(dense.eval(), pruned.eval(), image, every, options.seconds, threads, device)
    seen = list(bar(modes.measured(plan, options.processes), f"speed {cell}", options.processes))
    rows = [modes.row(mode, parts) for mode, parts in zip(every, zip(*seen), strict=True)]
    with timing.threads(threads):
        operators = by_operator({"dense": dense, files.method: pruned}, image, device)
    write_json(files.paths.cell_report(f"speed/{cell}"), {
        "cell": cell, "method": files.method, "platform": here, "fingerprint": fingerprint, "modes": rows, **operators,
        "inputs": files.digest()})
    print(closing_line(cell, rows, time.perf_counter() - started))


def by_operator(networks: dict[str, torch.nn.Module], image: tuple[int, ...], device: torch.device) -> dict:
    """Every operator of one pass of each network, and what the machine can do at most."""
    prepared = [timing.prepared(network, device) for network in networks.values()]
    calls = profile(prepared, timing.example((BATCH, *image), device))
    return {"operators": {name: [asdict(call) for call in own] for name, own in zip(networks, calls, strict=True)},
            "operators_batch": BATCH, "ceilings": asdict(Ceilings.measured(device))}


def closing_line(cell: str, rows: list[dict], seconds: float) -> str:
    """The range of the speedups that were measured, and how many were not."""
    found = [row["speedup"] for row in rows if not row["reason"]]
    missing = len(rows) - len(found)
    left_out = f", {missing} not measured" if missing else ""
    return (f"speed {cell}: {min(found):.2f}x to {max(found):.2f}x in {len(found)} modes{left_out}, {seconds:.0f} s")


if __name__ == "__main__":
    run(main)

"""Stage latency: a table of layer latencies over widths, measured only when the budget is a latency.

Otherwise it writes the constant {"measured": false}, so that plans do not depend on the machine.
"""

import json
import time

import numpy as np

from _stage import run
from hobs_rspar import checkpoint, config
from hobs_rspar.coupling import Groups
from hobs_rspar.device import resolve_device
from hobs_rspar.hardware import platform, timing
from hobs_rspar.hardware.latency_measurement import measure_table
from hobs_rspar.hardware.latency_table import LatencyTable
from hobs_rspar.hardware.record import write_json
from hobs_rspar.paths import Paths


def main() -> None:
    params, start = config.load(), time.perf_counter()
    paths = Paths.of(params.study)
    if params.study.budget.macs is not None:
        write_json(paths.latency, {"measured": False})
        print(f"latency {params.study.name}: not measured, because the budget is MACs")
        return
    table = measure(params, paths)
    write_json(paths.latency, table.to_json())
    off = 100 * table.errors()
    print(f"latency {params.study.name}: {len(table.layers)} layers and {len(off)} whole networks at batch "
          f"{table.batch_size} on {table.platform}; a network that is left out is foretold within "
          f"{np.median(off):.1f} % (median; at worst {off.max():.1f} %), {time.perf_counter() - start:.0f} s")


def measure(params, paths: Paths) -> LatencyTable:
    """The table of the dense network at ``params.latency.batch_size``."""
    device, threads = resolve_device(params.device), params.benchmark.threads
    here = platform.slug(platform.fingerprint(device, threads))
    here = platform.require_platform(params.benchmark.platform, here)
    network, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
    groups = Groups.from_json(json.loads((paths.dense / "groups.json").read_text()))
    with timing.threads(threads):
        return measure_table(timing.prepared(network, device), groups, spec.example().to(device),
                             params.latency.batch_size, params.latency.rounds, here)


if __name__ == "__main__":
    run(main)

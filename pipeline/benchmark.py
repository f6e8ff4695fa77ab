"""Stage benchmark: a cell's recovered network against the dense one on this machine, and the cell's records.

python pipeline/benchmark.py METHOD SEED          one cell; writes reports/<study>/cells/ and platforms/
python pipeline/benchmark.py --checkpoint FILE    any network of this package, by itself; prints, writes --json FILE
"""

import argparse
import time
from pathlib import Path

from _stage import cell_arguments, run
from hobs_rspar import checkpoint, config, cost
from hobs_rspar.device import resolve_device
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import platform, serving, timing
from hobs_rspar.hardware.cell import Job, measure_cell
from hobs_rspar.hardware.record import CellFiles, cell_record, platform_record, write_json
from hobs_rspar.paths import Paths


def main() -> None:
    options = arguments()
    if options.checkpoint and options.cell:
        raise UserError(f"benchmark measures either a cell ({' '.join(options.cell)}) or --checkpoint "
                        f"{options.checkpoint}, not both; leave one out")
    if options.checkpoint:
        serve(options)
    else:
        params = config.load()
        benchmark(params, *cell_arguments(params))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", nargs="*", metavar="METHOD SEED", help="the cell to measure, as params.yaml says")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="measure this network by itself")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64], help="images per call (1 64)")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for all batch sizes together (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    return parser.parse_args()


def benchmark(params, method: str, seed: int) -> None:
    """Measures one cell and writes both records."""
    start = time.perf_counter()
    files, options = CellFiles(Paths.of(params.study), method, seed), params.benchmark
    device = resolve_device(params.device)
    fingerprint = platform.fingerprint(device, options.threads)
    here = platform.require_platform(options.platform, platform.slug(fingerprint))
    files.require()
    record = cell_record(files, params)
    with timing.threads(options.threads):
        measured = measure_cell(job(files, options, device))
    write_json(files.paths.cell_report(files.name), record)
    write_json(files.paths.platform_report(here, files.name), platform_record(files, here, fingerprint, measured))
    print(f"benchmark {files.name}: {speedups(measured)}, {time.perf_counter() - start:.0f} s")
    for flag in measured["flags"]:
        print(f"  note: {flag}")


def job(files: CellFiles, options, device) -> Job:
    """Both networks and how to measure them, after a check that they are this cell's."""
    dense, spec = checkpoint.load_with_spec(files.dense)
    recovered = checkpoint.load(files.recovered)
    files.require_macs(cost.count(recovered, spec.example()).macs)
    return Job(dense, recovered, spec.example(), tuple(options.batch_sizes), options.seconds, options.threads, device)


def speedups(measured: dict) -> str:
    """The largest batch with its interval, then the others."""
    parts = []
    for batch, entry in sorted(measured["batches"].items(), key=lambda item: -int(item[0])):
        interval = "" if parts else f" (95 % interval {entry['speedup_lo']:.2f}-{entry['speedup_hi']:.2f})"
        faster = "" if parts else " faster" if entry["speedup_lo"] > 1 else " as fast"
        parts.append(f"batch {batch} {entry['speedup']:.2f}x{faster}{interval}")
    return ", ".join(parts)


def serve(options: argparse.Namespace) -> None:
    """Measures one network by itself."""
    device = resolve_device(options.device)
    record = serving.measure_file(options.checkpoint, options.batch_sizes, options.seconds, options.threads, device)
    print(serving.as_text(record))
    if options.json:
        write_json(options.json, record)


if __name__ == "__main__":
    run(main)

"""One network file measured by itself: what ``benchmark.py --checkpoint`` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hobs_rspar import checkpoint, cost
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import physics, platform, timing
from hobs_rspar.hardware.metrics import measure_network, network_energy


def measure_file(path: Path, batch_sizes: Sequence[int], seconds: float, threads: int, device: torch.device) -> dict:
    """Latency, throughput, energy and size of the network in a file.

    Args:
        path: a safetensors file of this package.
        batch_sizes: images per call.
        seconds: of timing, for all batch sizes together.
        threads: CPU threads.
        device: where.

    Raises:
        UserError: the file is missing, truncated or no network; a number is not positive.
    """
    if min(*batch_sizes, seconds, threads) <= 0:
        raise UserError(f"--batch-sizes {' '.join(map(str, batch_sizes))} --seconds {seconds:g} --threads {threads}: "
                        "each must be above 0")
    network, spec = checkpoint.load_with_spec(path)
    image, size = spec.example(), cost.count(network, spec.example())
    network, shape = network.to(device), tuple(image.shape[1:])
    with timing.threads(threads):
        samples = measure_network(network, shape, batch_sizes, seconds)
        energy = network_energy(network, (max(batch_sizes), *shape), seconds)
        flags = [flag for timed in samples.values() for flag in (*physics.timing_flags(timed, spec.name, threads),
                                                                 *physics.peak_flags([timed], [size.macs], device))]
    fingerprint = platform.fingerprint(device, threads)
    return {"file": path.name, "sha256": checkpoint.digest(path), "network": spec.name, "image": list(shape),
            "params": size.params, "macs": size.macs, "platform": platform.slug(fingerprint),
            "fingerprint": fingerprint, "conditions": {"mode": "eager", "dtype": "fp32", "layout": "channels_last"},
            "batches": {str(batch): timed.summary() for batch, timed in samples.items()},
            "energy_j": energy.joules_per_image, "energy_reason": energy.reason,
            "flags": flags}


def as_text(record: dict) -> str:
    """The record for a reader."""
    made = record["fingerprint"]
    image = "x".join(map(str, record["image"]))
    size = f"{record['params']:,} parameters, {record['macs']:,} MACs per {image} image"
    lines = [f"{record['file']}: {record['network']}, {size}",
             f"platform {record['platform']}: {made['device']}, {made['cores']} cores, {made['threads']} thread(s), "
             f"torch {made['torch']}; " + ", ".join(record["conditions"].values())]
    for batch, row in record["batches"].items():
        lines.append(f"batch {batch:>4}: p50 {row['p50_ms']:.3f} ms, p90 {row['p90_ms']:.3f} ms, p99 "
                     f"{row['p99_ms']:.3f} ms, {row['throughput']:,.1f} images/s (n = {row['iterations']})")
    joules = record["energy_j"]
    lines.append(f"energy: {record['energy_reason'] if joules is None else f'{joules:.4g} J per image'}")
    return "\n".join(lines + [f"note: {flag}" for flag in record["flags"]])

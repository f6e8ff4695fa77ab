"""Stage sensitivity: gate statistics, Kronecker factors and H-OBS's elimination orders, from calibration images."""

import json
from pathlib import Path

import torch

from _stage import run
from hobs_rspar import checkpoint, config, data
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature import statistics
from hobs_rspar.device import resolve_device
from hobs_rspar.memory import keep_freed_memory
from hobs_rspar.paths import Paths
from hobs_rspar.progress import bar
from hobs_rspar.seeds import generator
from hobs_rspar.surgery import groups


def main() -> None:
    keep_freed_memory()
    params = config.load()
    paths, options = Paths.of(params.study), params.sensitivity
    torch.set_num_threads(options.threads)
    device = resolve_device(params.device)
    network, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
    network = network.to(device, memory_format=torch.channels_last)
    images = data.load(paths.data, "calibration", device).first(options.images)
    every = groups(network, spec.example().to(device))
    gates, factors = statistics.collect(network, every, images, options, generator(options.seed, "sensitivity"),
                                        lambda batches: bar(batches, "sensitivity"))
    checkpoint.save_tensors(paths.dense / "gates.safetensors", gates)
    checkpoint.save_tensors(paths.dense / "factors.safetensors", factors)
    write_json(paths.dense, every, gates)
    print(f"sensitivity {params.study.network}: {len(every)} groups, {every.sizes.sum()} channels, "
          f"{len(images)} images")


def write_json(folder: Path, every: Groups, gates: dict) -> None:
    """groups.json and scores.json, for people and for the report."""
    (folder / "groups.json").write_text(json.dumps(every.to_json()) + "\n")
    parts = {name: gates[name].split(every.sizes.tolist()) for name in statistics.SCORES}
    listed = [{"name": group.name, "channels": group.channels,
               "macs_share": sum(every.layers[m.layer][0] for m in group.with_role("producer")) / every.dense_macs,
               "scores": {name: [significant(x) for x in parts[name][i].tolist()] for name in parts}}
              for i, group in enumerate(every)]
    (folder / "scores.json").write_text(json.dumps({"groups": listed}, indent=1) + "\n")


def significant(value: float) -> float:
    """Six significant digits: enough to draw and to rank."""
    return float(f"{value:.6g}")


if __name__ == "__main__":
    run(main)

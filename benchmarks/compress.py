"""Seconds and peak memory of every phase of ``compress``: ``python benchmarks/compress.py mobilenet_v2@224``.

Each network, ``name@edge`` of its images, runs in a process of its own, with random weights and random images: what it
costs depends on neither. Without names: resnet18@64, mobilenet_v2@224, resnet50@224.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from hobs_rspar import compress, networks  # noqa: E402
from hobs_rspar.curvature.repair import reestimate_batchnorm  # noqa: E402
from hobs_rspar.data import Images  # noqa: E402
from hobs_rspar.evidence.table_formats import Column, Table, markdown_rows  # noqa: E402

NETWORKS = ("resnet18@64", "mobilenet_v2@224", "resnet50@224")
CLASSES, BATCH = 1000, 50
NOTE = ("Seconds of each phase; in brackets the most memory, in GiB, that the process had held by its end. CPU seconds "
        "are those of all threads, and of the loading of images, too.")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="name@edge")
    parser.add_argument("--macs", type=float, default=0.5, help="fraction to keep")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--method", default="hobs_rspar")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="measure the one network in this process")
    return parser.parse_args(given)


def images(count: int, edge: int) -> Images:
    """Coarse random patterns under noise, of random classes."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (count, 3, 8, 8), generator=random, dtype=torch.uint8)
    places = torch.arange(edge) * 8 // edge
    noise = torch.randint(64, (count, 3, edge, edge), generator=random, dtype=torch.uint8)
    labels = torch.randint(CLASSES, (count,), generator=random)
    pixels = coarse[:, :, places][..., places] // 2 + noise
    return Images(pixels, labels, torch.full((3,), 0.45), torch.full((3,), 0.25))


class Batches:
    """A loader of normalised images."""

    def __init__(self, data: Images):
        self.data = data

    def __iter__(self):
        return self.data.batches(BATCH)


def measured(name: str, asked: argparse.Namespace) -> dict:
    """Compresses one network; a row of the table."""
    torch.set_num_threads(asked.threads)
    network, _, edge = name.partition("@")
    data = images(asked.images, int(edge))
    dense = networks.build(networks.NetworkSpec(network, CLASSES, 3, int(edge)))
    reestimate_batchnorm(dense, data.first(BATCH), batch_size=BATCH)  # else signals grow or vanish
    started = time.perf_counter(), time.process_time()
    _, plan, report = compress(dense, Batches(data), asked.macs, method=asked.method)
    spent = {"all": time.perf_counter() - started[0], "cpu": time.process_time() - started[1]}
    phases = {phase: f"{seconds:.1f} ({report['peak_memory'].get(phase, 0) / 2**30:.2f})"
              for phase, seconds in report["seconds"].items()}
    return {"network": name, "macs": f"{plan.macs_ratio:.3f}", **phases,
            **{kind: f"{seconds:.1f}" for kind, seconds in spent.items()}}


def in_a_process_of_its_own(name: str, asked: argparse.Namespace) -> dict:
    """As :func:`measured`; peak memory is a process's, and never falls."""
    command = [sys.executable, __file__, name, "--alone"]
    for option in ("macs", "images", "method", "threads"):
        command += [f"--{option}", str(getattr(asked, option))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    asked = arguments()
    if asked.alone:
        print(json.dumps(measured(asked.networks[0], asked)))
        return
    rows = [in_a_process_of_its_own(name, asked) for name in asked.networks]
    names = list(dict.fromkeys(key for row in rows for key in row))
    title = f"compress by {asked.method}, {asked.images} images, {asked.threads} threads"
    table = Table("compress", title, NOTE, tuple(Column(name, name) for name in names), rows)
    print(f"{title}\n\n{markdown_rows(table)}\n{NOTE}")


if __name__ == "__main__":
    main()

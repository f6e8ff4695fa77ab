"""Training steps with and without ``memory.keep_freed_memory``, in turn: ``python benchmarks/memory.py``.

Each way has processes of its own, because the C library's setting cannot be taken back. Prints the ratio of medians of
CPU time of a training step, for a ResNet-20 at uneven widths.
"""

import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from batchnorm import BATCH, pruned, step_seconds  # noqa: E402
from hobs_rspar.memory import keep_freed_memory  # noqa: E402

PROCESSES, STEPS = 5, 12
WAYS = ("as it is", "kept")


def steps() -> float:
    """Median seconds of a training step in this process."""
    torch.set_num_threads(1)
    images = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    network, labels = pruned((0.45, 0.61, 0.53)), torch.randint(10, (BATCH,))
    return statistics.median([step_seconds(network, images, labels) for _ in range(STEPS)][2:])


def main() -> None:
    if len(sys.argv) > 1:  # one of the processes
        if sys.argv[1] == WAYS[1]:
            keep_freed_memory()
        print(steps())
        return
    found = {way: [] for way in WAYS}
    for _ in range(PROCESSES):
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, way], check=True, capture_output=True, text=True)
            found[way].append(float(done.stdout))
    plain, kept = (statistics.median(found[way]) for way in WAYS)
    print(f"training step: {1000 * plain:.1f} ms as it is, {1000 * kept:.1f} ms kept, {plain / kept:.2f}x")


if __name__ == "__main__":
    main()

"""Training steps with PyTorch's batch norm and with the wide view, in turn: ``python benchmarks/batchnorm.py``.

Prints the ratio of medians of a whole step (forward, backward) in CPU time, for stages of 8, 16, 32 channels (a
ResNet-20 at half width) and for an uneven allocation. No claim is made where the ratio is near 1.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from hobs_rspar import checkpoint, networks, surgery  # noqa: E402
from hobs_rspar.batchnorm import wide_batchnorm  # noqa: E402

ROUNDS, BATCH = 15, 128
SPEC = networks.NetworkSpec("resnet20", 10, 1, 28)


def pruned(ratios: tuple[float, ...]) -> torch.nn.Module:
    """A ResNet-20 whose groups keep the given fractions, in turn."""
    network = networks.build(SPEC)
    groups = surgery.groups(network, SPEC.example())
    kept = [list(range(max(1, round(ratios[i % len(ratios)] * group.channels)))) for i, group in enumerate(groups)]
    return checkpoint.fit(network, groups.sliced(network.state_dict(), kept), "benchmark").train()


def step_seconds(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(images).float(), labels)
    loss.backward()
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    images = torch.randn(BATCH, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    for name, ratios in (("8, 16, 32 channels", (0.5,)), ("uneven widths", (0.45, 0.61, 0.53))):
        network, times = pruned(ratios), {nullcontext: [], wide_batchnorm: []}
        for _ in range(ROUNDS):
            for way, seconds in times.items():
                with way(network):
                    seconds.append(step_seconds(network, images, labels))
        plain, wide = (statistics.median(seconds[3:]) for seconds in times.values())
        print(f"{name}: {1000 * plain:.1f} ms plain, {1000 * wide:.1f} ms wide, {plain / wide:.2f}x")


if __name__ == "__main__":
    main()

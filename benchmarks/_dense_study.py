"""What the experiments on the dense network share: network and images."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from _experiment import publish
from hobs_rspar import checkpoint, config, data
from hobs_rspar.coupling import Groups
from hobs_rspar.data import Images
from hobs_rspar.paths import Paths
from hobs_rspar.surgery import groups

THREADS = 1


@dataclass(frozen=True)
class DenseStudy:
    """The study of params.yaml, as far as the sensitivity stage sees it; never its test images.

    Attributes:
        calibration: as many images as ``params.sensitivity.images``.
        validation: held out of training and of calibration.
    """

    params: config.Params
    paths: Paths
    network: nn.Module
    groups: Groups
    calibration: Images
    validation: Images
    started: float

    @classmethod
    def load(cls) -> DenseStudy:
        """Reads the study; sets PyTorch's threads to ``THREADS``."""
        started = time.perf_counter()
        torch.set_num_threads(THREADS)
        params = config.load()
        paths = Paths.of(params.study)
        network, spec = checkpoint.load_with_spec(paths.dense / "dense.safetensors")
        return cls(params, paths, network, groups(network, spec.example()),
                   data.load(paths.data, "calibration").first(params.sensitivity.images),
                   data.load(paths.data, "validation"), started)

    @property
    def subject(self) -> str:
        return f"{self.params.study.network} on {self.params.study.dataset}, CPU, {THREADS} thread"

    def publish(self, claim: str, record: dict) -> None:
        """Adds the wall time and publishes the record."""
        publish(self.params, {"claim": claim, **record, "seconds": round(time.perf_counter() - self.started, 1)})


def parts(images: Images, size: int) -> list[Images]:
    """Consecutive parts of ``size`` images; a shorter last one is left out."""
    return [replace(images, pixels=pixels, labels=labels) for pixels, labels
            in zip(images.pixels.split(size), images.labels.split(size)) if len(labels) == size]

"""What experiments on the dense network share: this checkout's package first on the path, network, images, claims."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from hobs_rspar import checkpoint, config, data  # noqa: E402
from hobs_rspar.coupling import Groups  # noqa: E402
from hobs_rspar.data import Images  # noqa: E402
from hobs_rspar.evidence import claim_files  # noqa: E402
from hobs_rspar.paths import Paths  # noqa: E402
from hobs_rspar.surgery import groups  # noqa: E402

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

    def write(self, claim: str, record: dict) -> None:
        """Adds the wall time and writes ``reports/<study>/claims/<experiment>.json``."""
        record = {"claim": claim, **record, "seconds": round(time.perf_counter() - self.started, 1)}
        print(f"{claim}: {record['measured']:.4g} {record['unit']} ({record['lo']:.4g} to {record['hi']:.4g}), "
              f"{'holds' if record['holds'] else 'does not hold'}; {record['conditions']}; {record['seconds']} s")
        claim_files.write(self.paths.claims / f"{Path(sys.argv[0]).stem}.json", record)


def parts(images: Images, size: int) -> list[Images]:
    """Consecutive parts of ``size`` images; a shorter last one is left out."""
    return [replace(images, pixels=pixels, labels=labels) for pixels, labels
            in zip(images.pixels.split(size), images.labels.split(size)) if len(labels) == size]

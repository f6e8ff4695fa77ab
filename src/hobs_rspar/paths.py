"""Where every file of a study lives. Imports no torch: report and the command line use it, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Paths:
    """File names of one study, relative to the repository root.

    Attributes:
        study: the study's name.
        dataset: the data set's name.
        network: the network's name (``package.module:function`` becomes a file-safe name).
    """

    study: str
    dataset: str
    network: str

    @classmethod
    def of(cls, study) -> Paths:
        """Paths of ``params.study``."""
        return cls(study.name, study.dataset, study.network)

    @property
    def data(self) -> Path:
        return Path("data") / self.dataset

    @property
    def dense(self) -> Path:
        return Path("artifacts") / "dense" / f"{self.dataset}_{self.network}"

    @property
    def latency(self) -> Path:
        return Path("artifacts") / self.study / "latency.json"

    def cell(self, cell: str) -> Path:
        return Path("artifacts") / self.study / "cells" / cell

    def cost(self, cell: str, stage: str) -> Path:
        """Wall time of one stage of one cell: beside the outputs, never one of them (it differs every run)."""
        return Path("artifacts") / self.study / "costs" / cell / f"{stage}.json"

    def resume(self, name: str) -> Path:
        """Folder of the resume checkpoint and the lock of one training run."""
        return Path("artifacts") / self.study / "resume" / name

    def lessons(self, key: str) -> Path:
        """Folder of the teacher's answers in one recovery recipe with one seed, for the cells of all methods."""
        return Path("artifacts") / self.study / "lessons" / key

    @property
    def report(self) -> Path:
        return Path("reports") / self.study

    def cell_report(self, cell: str) -> Path:
        return self.report / "cells" / f"{cell}.json"

    @property
    def claims(self) -> Path:
        """Folder of the results of the experiments in benchmarks/, one JSON file each."""
        return self.report / "claims"

    @property
    def speed(self) -> Path:
        """Folder of what the speed stage found, one JSON file per cell."""
        return self.report / "speed"

    def platform_report(self, platform: str, cell: str) -> Path:
        return self.report / "platforms" / platform / f"{cell}.json"

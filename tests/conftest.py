"""Fixtures that several tests share: temporary copies of this checkout, in which studies have run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clones import ROOT, Clone
from hobs_rspar.config import CLAIMS, EXPERIMENTS

MICRO = """\
# The smallest study with every stage: one cell.
study:
  network: resnet8
  methods:
    - l1
  seeds:
    - 7
  budget:
    macs: 0.6
  claims: []
data:
  validation: 200
  calibration: 128
  train_images: 1000
  test_images: 200
pretrain:
  epochs: 1
  crops: []
sensitivity:
  images: 128
prune:
  images: 128
finetune:
  epochs: 1
  crops: []
benchmark:
  seconds: 0.1
report:
  resamples: 50
"""


SHARED = ("toy", "micro", "stubbed")  # fixtures that take minutes: tests that share one run in one process


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a long fixture stay together, and go first: at the end they would leave a process idle."""
    for item in items:
        for name in SHARED:
            if name in item.fixturenames:
                item.add_marker(pytest.mark.xdist_group(name))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


@pytest.fixture(scope="session")
def new_clone(tmp_path_factory) -> Callable[[str], Clone]:
    """Makes a copy of this checkout with the given name."""
    return lambda name: Clone.of_checkout(tmp_path_factory.mktemp("clones") / name)


@pytest.fixture(scope="session")
def toy(new_clone) -> Clone:
    """The toy study, run by two commands: ``make study STUDY=toy`` and ``make repro JOBS=2``. Not to be changed."""
    clone = new_clone("toy")
    clone.write("printed/study", clone.run("make study STUDY=toy"))
    clone.write("printed/repro", clone.run("make repro JOBS=2"))
    keep_downloads(clone)
    keep_results(clone)
    clone.commit("toy study")
    return clone


@pytest.fixture(scope="session")
def micro(new_clone) -> Clone:
    """A study of one cell, run by plain ``dvc repro`` and committed. Tests leave it as they found it."""
    clone = new_clone("micro")
    clone.write("configs/micro.yaml", MICRO)
    clone.run("make study STUDY=micro")
    clone.run("dvc repro")
    keep_downloads(clone)
    keep_results(clone)
    clone.commit("micro study")
    return clone


@pytest.fixture(scope="session")
def stubbed(new_clone) -> Clone:
    """Two methods, two seeds, and stubs instead of stages: the real graph, run in seconds and committed."""
    clone = new_clone("stubbed")
    stub = (Path(__file__).parent / "stub_stage.py").read_text()
    stages = [script.stem for script in (clone.path / "pipeline").glob("[!_]*.py")]
    experiments = [f"benchmarks/{name}.py" for name in CLAIMS + EXPERIMENTS]
    for script in [*(f"pipeline/{name}.py" for name in stages), *experiments]:
        clone.write(script, stub)
    (clone.path / "dvc.lock").unlink(missing_ok=True)
    shutil.copy(clone.path / "configs/default.yaml", clone.path / "params.yaml")
    clone.set_params(**{"study.name": "stubbed", "study.methods": ["l1", "hobs_rspar"], "study.seeds": [1, 2]})
    clone.run("dvc repro")
    keep_results(clone)
    clone.commit("stubbed study")
    return clone


def keep_results(clone: Clone) -> None:
    """Puts into Git what is there of the default study alone, so that a checkout brings it back to every test."""
    clone.run("git add --force reports artifacts/dense/*/*.json artifacts/dense/*/dense.safetensors")


def keep_downloads(clone: Clone) -> None:
    """Keeps fetched raw files in this checkout, so that the next copy, or the next run offline, need not fetch them."""
    fetched, kept = clone.path / "data/downloads", ROOT / "data/downloads"
    if fetched.is_dir() and not fetched.is_symlink() and not kept.exists():
        shutil.copytree(fetched, kept)

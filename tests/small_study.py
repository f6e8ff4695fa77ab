"""A study of one cell on a few random images, whose stage scripts run in this process."""

from __future__ import annotations

import copy
import json
import runpy
import sys
from pathlib import Path

import yaml

from clones import ROOT
from hobs_rspar import checkpoint, data
from small import ZOO, images, zoo, zoo_groups

PARAMS = yaml.safe_load((ROOT / "configs/default.yaml").read_text())


def changed(**changes) -> dict:
    """The default params with some keys changed: ``study__budget__macs=2``."""
    params = copy.deepcopy(PARAMS)
    for key, value in changes.items():
        *path, last = key.split("__")
        section = params
        for part in path:
            section = section[part]
        section[last] = value
    return params


def make(folder: Path, monkeypatch, **changes) -> Path:
    """Params, data and a dense network in ``folder``, which becomes the current one; ``changes`` as of ``changed``."""
    params = changed(**{"study__network": "resnet8", "study__name": "small", "study__methods": ["l1"],
                        "study__seeds": [7], "finetune__epochs": 1, "finetune__crops": [], "finetune__images": None,
                        "finetune__precision": "fp32", "prune__images": 32} | changes)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    source = images(400, 1, 28, 10)
    classes = [str(number) for number in range(10)]
    raw = data.Raw(source.pixels, source.labels, source.pixels[:40], source.labels[:40], classes, "")
    options = type("Options", (), {"validation": 100, "calibration": 32, "split_seed": 0, "train_images": None,
                                   "test_images": None})
    data.split_and_save(raw, "fashion_mnist", options, folder / "data/fashion_mnist")
    dense = folder / "artifacts/dense/fashion_mnist_resnet8"
    checkpoint.save(dense / "dense.safetensors", zoo("resnet8"), ZOO["resnet8"])
    (dense / "groups.json").write_text(json.dumps(zoo_groups("resnet8").to_json()))
    (folder / "artifacts/small").mkdir()
    (folder / "artifacts/small/latency.json").write_text('{"measured": false}')
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "pipeline"))
    return folder


def set_params(folder: Path, **changes) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for key, value in changes.items():
        section, name = key.split("__")
        params[section][name] = value
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def stage(name: str, monkeypatch, *arguments: str) -> str:
    """Runs a script as ``python`` does; returns its error message, or an empty string."""
    monkeypatch.setattr(sys, "argv", [f"pipeline/{name}.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "pipeline" / f"{name}.py"), run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, str)  # printed on stderr, exit status 1
        return end.code
    return ""

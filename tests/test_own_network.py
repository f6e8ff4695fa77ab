"""A user's images and networks with activations in place, through the stages: from the folder to the recovered one."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from clones import ROOT
from small_study import PARAMS, changed, stage

NET = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2, bias=False), nn.BatchNorm2d(24), nn.ReLU(inplace=True),
                         nn.Conv2d(24, 24, 3), nn.BatchNorm2d(24), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(24, classes))
"""
SMALL = {"data__validation": 16, "data__calibration": 16, "data__image_size": 40, "device": "cpu",
         "pretrain__epochs": 2, "finetune__epochs": 1, "pretrain__batch_size": 32, "finetune__batch_size": 32,
         "pretrain__crops": [], "finetune__crops": [], "pretrain__images": None, "finetune__images": None,
         "sensitivity__images": 16, "sensitivity__batch_size": 8, "sensitivity__positions": 4, "prune__images": 16,
         "prune__positions": 8}
SEARCH = {"first": 4, "rounds": 1, "measured": 1, "iterations": 1, "episodes": 2}


def write_images(folder: Path) -> None:
    """Three classes that a channel tells apart; files of every kind."""
    random = np.random.default_rng(0)
    for part, each in (("train", 32), ("val", 4)):
        for name in range(3):
            (folder / part / f"class {name}").mkdir(parents=True)
            for number in range(each):
                pixels = random.integers(0, 90, (40, 48, 3))
                pixels[..., name] += 120
                kind = ("png", "jpg", "tif")[number % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"class {name}" / f"{number}.{kind}")


@pytest.mark.parametrize(("network", "method"), [("own_net:net", "hobs_rspar")])
def test_from_a_folder_of_images_to_a_recovered_network(network, method, tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    (tmp_path / "own_net.py").write_text(NET)
    block = PARAMS["methods"][method] | (SEARCH if method == "hobs_rspar" else {})
    params = changed(**SMALL, study__name="mine", study__dataset="image_folder", study__network=network,
                     study__methods=[method], study__seeds=[7], study__claims=[], study__budget__macs=0.6,
                     data__folder="images", methods={method: block})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, ROOT / "pipeline"):
        monkeypatch.syspath_prepend(str(path))
    for name in ("data", "pretrain", "sensitivity", "latency"):
        assert stage(name, monkeypatch) == "", name
    for name in ("allocate", "prune", "finetune"):
        assert stage(name, monkeypatch, method, "7") == "", name
    sys.modules.pop("own_net", None)
    recovery = json.loads((tmp_path / f"artifacts/mine/cells/{method}-7/recovery.json").read_text())
    assert recovery["test_images"] == 12 and 0 <= recovery["top1_test"] <= 100
    plan = json.loads((tmp_path / f"artifacts/mine/cells/{method}-7/plan.json").read_text())
    assert abs(plan["macs_ratio"] / 0.6 - 1) < 0.02

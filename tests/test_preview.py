"""``make preview``: whose data it describes, that it gets to its end, and what it takes the time to be."""

import json
import sys
from hashlib import md5
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from clones import ROOT
from hobs_rspar import config, networks
from hobs_rspar.errors import UserError
from small_study import PARAMS, changed

sys.path.append(str(ROOT / "tasks"))  # as Python does for the script's own folder

import _estimate  # noqa: E402
import _measure  # noqa: E402
import preview  # noqa: E402
import study as studies  # noqa: E402


@pytest.mark.parametrize("study", sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
def test_every_method_has_an_estimate(study, tmp_path):
    (tmp_path / "params.yaml").write_text(studies.composed(ROOT / f"configs/{study}.yaml"))
    params = config.load(tmp_path / "params.yaml")
    for method in params.study.methods:
        seconds = preview.allocation_seconds(params, f"{method}-7", training=100.0, infer=1000.0)
        assert seconds >= 0


def test_estimates_of_searching_and_of_training():
    params = config.load(ROOT / "configs/default.yaml")
    blocks, seconds = params.methods, {}
    for name in ("hobs_rspar", "jtp", "structalign", "l1"):
        seconds[name] = preview.allocation_seconds(params, f"{name}-7", training=100.0, infer=1000.0)
    search = blocks["hobs_rspar"]
    plans = search["first"] + search["rounds"] * search["measured"]
    assert seconds == {"hobs_rspar": plans * search["images"] / 1000, "jtp": blocks["jtp"]["images"] / 100,
                       "structalign": 2 * blocks["structalign"]["images"] / 100, "l1": 0}


# --- whose data it describes

def write_folder(folder: Path, classes: int, each: int) -> Path:
    for part, count in (("train", each), ("val", 1)):
        for name in range(classes):
            (folder / part / f"class{name}").mkdir(parents=True)
            for number in range(count):
                Image.new("L", (9, 9)).save(folder / part / f"class{name}" / f"{number}.png")
    return folder


def study_of(folder: Path, size: int, **changes) -> config.Params:
    """Params of a study of an image folder, written to the current folder and read."""
    methods = {name: PARAMS["methods"][name] for name in ("l1", "unpruned")}
    params = changed(**{"methods": methods, "study__methods": list(methods), "study__claims": [],
                        "study__dataset": "image_folder", "study__network": "resnet8", "data__folder": str(folder),
                        "data__image_size": size, "data__validation": 3, "data__calibration": 2} | changes)
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return config.load()


def test_an_image_folder_is_counted_and_not_taken_for_another(tmp_path, monkeypatch):
    """The manifest that lies there is of whichever folder was read last."""
    monkeypatch.chdir(tmp_path)
    first, second = write_folder(tmp_path / "first", 3, 5), write_folder(tmp_path / "second", 6, 4)
    (tmp_path / "data/image_folder").mkdir(parents=True)
    (tmp_path / "data/image_folder/manifest.json").write_text(json.dumps(
        {"dataset": "image_folder", "classes": ["a", "b", "c"], "image_shape": [3, 32, 32], "images": {"train": 10}}))
    assert preview.shape(study_of(first, 32)) == (networks.NetworkSpec("resnet8", 3, 3, 32), 10)
    assert preview.shape(study_of(second, 96)) == (networks.NetworkSpec("resnet8", 6, 3, 96), 19)
    assert preview.shape(study_of(second, 48, data__train_images=7))[1] == 7
    assert preview.shape(study_of(first, 48)) == (networks.NetworkSpec("resnet8", 3, 3, 48), 10)
    Image.new("L", (9, 9)).save(first / "train/class0/new.png")
    assert preview.shape(study_of(first, 48))[1] == 11
    with pytest.raises(UserError, match="data.validation . data.calibration = 22 images, but image_folder has only 16"):
        preview.shape(study_of(first, 48, data__validation=20))
    with pytest.raises(UserError, match="there is no folder"):
        preview.shape(study_of(tmp_path / "third", 48))


def test_the_other_data_sets_have_their_own_shapes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = study_of(tmp_path, 32, study__dataset="fashion_mnist", data__image_size=None)
    assert preview.shape(params) == (networks.NetworkSpec("resnet8", 10, 1, 28), 60_000 - 5)


def test_scores_of_another_folder_are_not_shown(tmp_path, monkeypatch):
    """Studies of image folders share the place of their dense network and of what is known about it."""
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path / "images", 3, 5)
    params = study_of(folder, 32)
    scores = tmp_path / "artifacts/dense/image_folder_resnet8/scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({"groups": [{"name": "conv1", "scores": {"hobs": [1.0, 2.0]}}]}))
    groups = [type("Group", (), {"name": "conv1"})]
    assert preview.hobs_scores(params, groups) == {}  # no dvc.lock
    raw = yaml.safe_load(Path("params.yaml").read_text())
    read = {"data": {"data": raw["data"], "study.dataset": "image_folder"},
            "pretrain": {"pretrain": raw["pretrain"], "study.network": "resnet8"},
            "sensitivity": {"sensitivity": raw["sensitivity"]}}
    outs = [{"path": str(scores.relative_to(tmp_path)), "md5": md5(scores.read_bytes()).hexdigest()}]
    lock = {"schema": "2.0", "stages": {stage: {"cmd": "", "params": {"params.yaml": params_},
                                                "outs": outs if stage == "sensitivity" else []}
                                        for stage, params_ in read.items()}}
    Path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    assert preview.hobs_scores(params, groups) == {"conv1": [1.0, 2.0]}
    for changes in ({"data__image_size": 48}, {"data__folder": str(tmp_path)}, {"sensitivity__images": 7},
                    {"study__network": "resnet20"}):
        assert not _estimate.made_with(study_of(folder, 32, **changes), "data", "pretrain", "sensitivity")
    scores.write_text(scores.read_text() + "\n")  # of another run
    assert preview.hobs_scores(study_of(folder, 32), groups) == {}


# --- to its end

IN_PLACE = """
from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(3, 24, 3, 2), nn.BatchNorm2d(24), nn.ReLU(inplace=True), nn.Conv2d(24, 24, 3),
                         nn.BatchNorm2d(24), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Dropout(0.2, inplace=True), nn.Linear(24, classes))
"""


@pytest.mark.parametrize("network", ["preview_nets:net", "resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_preview_gets_to_its_end(network, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(_measure, "STEPS", 1)
    monkeypatch.setattr(sys, "argv", ["preview.py", "--jobs", "2"])
    (tmp_path / "preview_nets.py").write_text(IN_PLACE)
    study_of(write_folder(tmp_path / "images", 3, 5), 32, study__network=network, study__budget__macs=0.6,
             allocation__round_to=8, finetune__batch_size=8, device="cpu",
             pretrain__source="mine.safetensors", pretrain__crops=[], finetune__crops=[], finetune__curve=[])
    threads = torch.get_num_threads()
    try:
        preview.main()
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert f"{network} on image_folder (3x32x32, 3 classes)" in out and "of which pretraining 0 s" in out
    assert "0 cells have recorded times" in out and "inference" in out
    kept = [line.split() for line in out.splitlines() if line.endswith(" -")]
    assert kept and all(int(width) % 8 == 0 or width == channels for _, channels, width, _ in kept)

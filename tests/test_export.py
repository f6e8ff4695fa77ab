"""Exported networks: what the files compute, what they must not hold, the stage, and the model card."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hobs_rspar import checkpoint, deployment
from hobs_rspar.errors import UserError
from hobs_rspar.model_card import with_interval
from small import ZOO, images, zoo
from small_study import make, stage


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    deployment.write(zoo("resnet8"), ZOO["resnet8"], folder)
    return folder


def test_both_files_compute_what_the_network_does(exported):
    data = images(9, 1, 28, 10)
    x, runs = data.normalised(data.pixels), deployment.load(exported, 1)
    found = deployment.compared(zoo("resnet8"), runs, x)
    assert set(found) == {"onnx", "torch_export"}
    for entry in found.values():
        assert entry["largest_difference"] < 1e-4 and entry["same_class"] == 1
    for count in (1, 5):  # any number of images
        assert runs["onnx"](x[:count].contiguous()).shape == (count, 10)
    assert torch.allclose(runs["onnx"](x.contiguous()), zoo("resnet8")(x), atol=1e-4)


def test_another_network_is_noticed(exported):
    other = zoo("resnet8")
    runs = {"onnx": lambda x: deployment.load(exported, 1)["onnx"](x) + 1.0}
    with pytest.raises(UserError, match=r"model.onnx does not compute what the network does: logits differ by"):
        deployment.compared(other, runs, torch.randn(3, 1, 28, 28))


def test_files_name_no_folder_of_this_machine(exported):
    for name in ("model.onnx", "model.pt2"):
        content = (exported / name).read_bytes()
        assert str(Path(deployment.__file__).parents[1]).encode() not in content
        assert b"site-packages" not in content
    model = onnx.load(exported / "model.onnx")
    onnx.checker.check_model(model)
    assert [entry.name for entry in model.graph.input] == ["images"]
    assert [entry.name for entry in model.graph.output] == ["logits"]


def test_the_network_stays_as_it_was_and_gives_the_same_bytes(tmp_path, exported):
    network = zoo("resnet8").to(memory_format=torch.channels_last)
    deployment.write(network, ZOO["resnet8"], tmp_path)
    assert network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (tmp_path / "model.onnx").read_bytes() == (exported / "model.onnx").read_bytes()


def test_the_interval_is_wilsons():
    """Agresti and Coull (1998): 15 of 20."""
    found = with_interval(np.array([True] * 15 + [False] * 5), 0.95)
    assert (found["top1"], found["images"]) == (75, 20)
    assert (found["lo"], found["hi"]) == pytest.approx((53.13, 88.81), abs=0.01)


def test_stage_writes_files_record_and_card(tmp_path, monkeypatch):
    folder = make(tmp_path, monkeypatch, study__methods=["l1"], finetune__batch_size=32, prune__precision="fp32",
                  benchmark__seconds=0.1, benchmark__batch_sizes=[1, 2])
    for name in ("allocate", "prune", "finetune"):
        assert stage(name, monkeypatch, "l1", "7") == ""
    assert "usage: python pipeline/export.py CELL. Cells of this study: l1-7" in stage("export", monkeypatch)
    assert "Did you mean 'l1-7'?" in stage("export", monkeypatch, "l1-8")
    assert stage("export", monkeypatch, "l1-7") == ""
    record = json.loads((folder / "reports/small/exports/l1-7.json").read_text())
    written = folder / "artifacts/small/cells/l1-7/export"
    for entry in record["files"].values():
        assert checkpoint.digest(written / entry["file"]) == entry["sha256"]
        assert (written / entry["file"]).stat().st_size == entry["bytes"]
    assert set(record["latency"]) == {"1", "2"} and record["commit"] is None
    recovery = json.loads((folder / "artifacts/small/cells/l1-7/recovery.json").read_text())
    assert record["accuracy"]["top1"] == pytest.approx(recovery["top1_test"])
    assert record["accuracy"]["lo"] < record["accuracy"]["top1"] < record["accuracy"]["hi"]
    card = (folder / "reports/small/exports/l1-7.md").read_text()
    assert f"{record['macs']:,} MACs" in card and record["weights_digest"] in card
    assert re.search(r"\| 1 \| [\d.]+ \| [\d.]+ \| [\d.]+ \[[\d.]+, [\d.]+\] \|", card)
    assert "not recorded: no Git repository" in card

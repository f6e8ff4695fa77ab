"""The experiment peers on an ImageNet network: not measured without its folder; and how it reads images."""

import sys

import pytest
import torch
from PIL import Image

from clones import ROOT
from hobs_rspar.allocation import environment
from hobs_rspar.curvature import hobs, repair
from hobs_rspar.evidence.claim_files import ClaimTable

sys.path.append(str(ROOT / "benchmarks"))  # as Python does for the script's own folder

import _oneshot  # noqa: E402


@pytest.mark.parametrize(("folder", "why"), [(None, "the environment variable IMAGENET_SAMPLE names no folder"),
                                             ("", "has no weights/imagenet_mobilenet_v2.safetensors"),
                                             ("weights/", "has no imagenet_sample/labels.csv")])
def test_without_the_folder_nothing_is_measured_and_the_reason_is_said(tmp_path, monkeypatch, folder, why):
    if folder is None:
        monkeypatch.delenv(_oneshot.VARIABLE, raising=False)
    else:
        monkeypatch.setenv(_oneshot.VARIABLE, str(tmp_path))
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "imagenet_mobilenet_v2.safetensors").touch()
    table = ClaimTable.model_validate(_oneshot.table())
    assert table.note.startswith("Not measured: ") and why in table.note
    assert [row["network"] for row in table.rows] == list(_oneshot.WAYS)
    assert all(row.keys() == {"network"} for row in table.rows)


def test_images_are_the_middles_in_a_random_order(tmp_path):
    (tmp_path / "images").mkdir()
    lines = ["path,class_index,wnid"]
    for i in range(6):
        picture = Image.new("RGB", (400, 256) if i % 2 else (256, 300), (40 * i, 0, 0))
        picture.paste((0, 255, 0), (0, 0, 10, 10))  # a corner, which is cut off
        picture.save(tmp_path / f"images/{i}.png")
        lines.append(f"images/{i}.png,{10 * i},n{i}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    images = _oneshot.sample(tmp_path)
    assert images.pixels.shape == (6, 3, 224, 224) and sorted(images.labels.tolist()) == [0, 10, 20, 30, 40, 50]
    assert images.labels.tolist() != sorted(images.labels.tolist())
    assert torch.equal(images.pixels[:, 0, 0, 0].long(), 4 * images.labels) and not images.pixels[:, 1].any()
    assert _oneshot.middle(Image.new("RGB", (512, 600))).shape == (3, 224, 224)
    assert len(_oneshot.part(images, 2)) == 4


def test_exact_approximates_nothing_and_ends():
    before = hobs.SMALL, environment.PIXELS, repair.HELD
    with _oneshot.exact():
        assert hobs.SMALL > 2**60 and environment.PIXELS > 2**30 and repair.HELD > 2**30
    assert (hobs.SMALL, environment.PIXELS, repair.HELD) == before

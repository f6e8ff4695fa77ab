"""The experiments that are run by hand, on a study of a few images: their tables follow from what was measured."""

import sys

import pytest
import torch

import small_study
from clones import ROOT
from hobs_rspar.checkpoint import save_tensors
from hobs_rspar.errors import UserError
from hobs_rspar.evidence import claim_files
from small import zoo_groups

sys.path.append(str(ROOT / "benchmarks"))  # as Python does for the script's own folder

import masked  # noqa: E402
import peers  # noqa: E402
import rounding  # noqa: E402


@pytest.fixture()
def study(tmp_path, monkeypatch):
    folder = small_study.make(tmp_path, monkeypatch, study__seeds=[7, 8], study__budget={
        "macs": 0.5, "latency_ms": None, "latency_ratio": None})
    (folder / "data/fashion_mnist/test.safetensors").unlink()  # nobody may look at it
    return folder


def add_sensitivity(folder) -> None:
    """H-OBS scores, as the sensitivity stage leaves them."""
    channels = int(zoo_groups("resnet8").sizes.sum())
    save_tensors(folder / "artifacts/dense/fashion_mnist_resnet8/gates.safetensors", {"hobs": torch.rand(channels)})


def tables(folder, monkeypatch, module) -> dict[str, list[dict]]:
    """Runs an experiment; the rows of its tables."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py"])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    record, = claim_files.read(folder / "reports/small/claims").values()
    assert not record.judged
    return {table.name: table.rows for table in record.tables}


def test_masked_sparsity(study, monkeypatch):
    monkeypatch.setattr(masked, "SECONDS", 0.2)
    rows = tables(study, monkeypatch, masked)["masked"]
    assert [row["direction"] for row in rows] == ["input channels", "output channels"]
    for row in rows:
        assert row["n"] == 2 and row["macs_ratio"] == pytest.approx(0.5, rel=0.01)
        assert row["top1_lo"] <= row["top1"] <= row["top1_hi"] and 0 < row["weights_ratio"] < 0.7


def test_masked_sparsity_needs_a_budget_of_macs(tmp_path, monkeypatch):
    small_study.make(tmp_path, monkeypatch, study__budget={"macs": None, "latency_ms": None, "latency_ratio": 0.5})
    for module in (masked, peers):
        with pytest.raises(UserError, match="study.budget.macs is null"):
            module.main()


def test_torch_pruning_by_itself(study, monkeypatch):
    monkeypatch.setattr(peers, "OURS", ("l1",))
    monkeypatch.setattr(peers, "SECONDS", 0.2)
    monkeypatch.setattr(peers, "IMAGES", 8)
    rows = tables(study, monkeypatch, peers)["peers"]
    assert [row["network"] for row in rows] == [*(f"Torch-Pruning: {name}" for name in peers.PEERS), "l1"]
    for row in rows:
        assert row["macs_ratio"] == pytest.approx(0.5, rel=0.15)  # its steps are coarse on so small a network
        assert 0 <= row["top1"] <= 100 and row["params_ratio"] < 1 and row["speedup"] > 0


def test_widths_in_multiples(study, monkeypatch):
    monkeypatch.setattr(rounding, "METHODS", ("hobs_uniform",))
    monkeypatch.setattr(rounding, "SECONDS", 0.2)
    add_sensitivity(study)
    rows = tables(study, monkeypatch, rounding)["rounding"]
    assert [row["multiple"] for row in rows] == [1, 2, 4, 8]
    assert all(row["macs_ratio"] <= 0.5 * 1.01 for row in rows) and rows[0]["macs_ratio"] >= 0.5 * 0.99
    for row in rows:
        assert 0 <= row["top1"] <= 100 and row["per_mac"] == pytest.approx(row["speedup"] * row["macs_ratio"], abs=2e-3)

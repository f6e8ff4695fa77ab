"""The stages prune and finetune of one cell: repair in steps, recoveries of several lengths, going on after a kill."""

import base64
import copy
import json

import numpy as np
import pytest
import torch

from hobs_rspar import checkpoint, config, data, training
from hobs_rspar.curvature import repair
from hobs_rspar.hardware.latency_table import LatencyTable
from hobs_rspar.plan import PruningPlan
from hobs_rspar.slicing import remove
from small import zoo_groups
from small_study import make, set_params, stage

METHODS = ["unpruned", "l1", "l1_repair"]


@pytest.fixture
def study(tmp_path, monkeypatch):
    return make(tmp_path, monkeypatch, study__methods=METHODS, finetune__batch_size=32, prune__precision="fp32")


def pruned(folder, monkeypatch, method: str):
    """Allocates and prunes a cell; returns its folder."""
    for name in ("allocate", "prune"):
        assert stage(name, monkeypatch, method, "7") == ""
    return folder / f"artifacts/small/cells/{method}-7"


def test_a_latency_budget_goes_through_the_stages(study, monkeypatch):
    """0.8 of the latency that the table foretells for the dense network, whatever MACs that leaves."""
    set_params(study, study__budget={"macs": None, "latency_ms": None, "latency_ratio": 0.8}, latency__batch_size=16,
               latency__rounds=3)
    assert stage("latency", monkeypatch) == ""
    cell = pruned(study, monkeypatch, "l1")
    plan, groups = PruningPlan.load(cell / "plan.json"), zoo_groups("resnet8")
    table = LatencyTable.from_json(json.loads((study / "artifacts/small/latency.json").read_text()))
    widths = np.stack([[len(kept) for kept in plan.kept], groups.sizes])
    left, dense = table.network_ms(*groups.layer_widths(widths))
    assert plan.budget == {"latency_ratio": 0.8} and abs(left / dense - 0.8) <= 0.008
    assert json.loads((cell / "prune.json").read_text())["macs"] == plan.macs < plan.dense_macs


def top1(network, images) -> float:
    return training.accuracy(training.logits(network, images), images.labels)


# --- prune

@pytest.mark.parametrize("method", METHODS)
def test_repair_is_measured_in_steps(study, monkeypatch, method):
    """Recomputed step by step; the network that goes on is the plan's own."""
    cell = pruned(study, monkeypatch, method)
    found = json.loads((cell / "prune.json").read_text())
    validation, calibration = (data.load("data/fashion_mnist", name) for name in ("validation", "calibration"))
    plan = PruningPlan.load(cell / "plan.json")
    dense, spec = checkpoint.load_with_spec(study / "artifacts/dense/fashion_mnist_resnet8/dense.safetensors")
    network = remove(dense, zoo_groups("resnet8"), plan).to(memory_format=torch.channels_last)
    assert found["repair_steps"]["cut"]["top1"] == top1(network, validation)
    again = copy.deepcopy(network)
    repair.reestimate_batchnorm(again, calibration.first(32))
    assert found["repair_steps"]["batchnorm"]["top1"] == top1(again, validation)
    left = checkpoint.load(cell / "pruned.safetensors")
    if method == "l1_repair":
        assert list(found["repair_steps"]) == ["cut", "batchnorm", "refit"]
        assert found["repair_steps"]["refit"]["top1"] == top1(left, validation)
        errors = [step["reconstruction_error"] for step in found["repair_steps"].values()]
        assert len(set(errors)) == 3 and min(errors) > 0
    else:
        assert list(found["repair_steps"]) == ["cut", "batchnorm"]
        assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), network.state_dict().values()))


def test_weights_that_a_method_trained_are_the_ones_that_are_cut(study, monkeypatch):
    small = {"images": 64, "batch_size": 32, "strength": 1.0}
    set_params(study, methods__depgraph=small, study__methods=["depgraph", "l1"])
    cell, plain = (pruned(study, monkeypatch, method) for method in ("depgraph", "l1"))
    trained, nothing = (checkpoint.load_tensors(folder / "weights.safetensors")[0] for folder in (cell, plain))
    plan = PruningPlan.load(cell / "plan.json")
    dense, spec = checkpoint.load_with_spec(study / "artifacts/dense/fashion_mnist_resnet8/dense.safetensors")
    assert nothing == {} and plan.weights is None and plan.extra_training_images == 64
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in dense.state_dict().items())
    dense.load_state_dict(trained)
    wanted = remove(dense, zoo_groups("resnet8"), plan).state_dict()
    assert all(torch.equal(tensor, wanted[name])
               for name, tensor in checkpoint.load(cell / "pruned.safetensors").state_dict().items())
    (cell / "weights.safetensors").unlink()
    assert "depgraph-7/weights.safetensors not found" in stage("prune", monkeypatch, "depgraph", "7")


# --- finetune

def points(cell) -> list[dict]:
    return json.loads((cell / "recovery.json").read_text())["recovery_curve"]


def correct_of(point: dict, count: int = 40) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(point["correct"]), np.uint8), count=count)


def test_without_a_curve_none_and_full_recovery_are_measured(study, monkeypatch):
    cell = pruned(study, monkeypatch, "l1")
    assert stage("finetune", monkeypatch, "l1", "7") == ""
    result, (none, full) = json.loads((cell / "recovery.json").read_text()), points(cell)
    network = checkpoint.load(cell / "pruned.safetensors")
    for split, key in (("validation", "top1_validation"), ("test", "top1_test")):
        assert none[key] == top1(network, data.load("data/fashion_mnist", split))
        assert full[key] == result[key] == top1(checkpoint.load(cell / "recovered.safetensors"),
                                                data.load("data/fashion_mnist", split))
    assert (none["images"], none["seen"], full["images"], full["seen"]) == (0, 0, 268, 256)
    assert full["correct"] == result["correct"] and 100 * correct_of(none).mean() == pytest.approx(none["top1_test"])


def test_every_length_is_a_recovery_of_its_own(study, monkeypatch):
    """By hand: from the pruned network, one cycle over exactly these images, full-size crops, the cell's seed."""
    cell = pruned(study, monkeypatch, "l1")
    set_params(study, finetune__epochs=2, finetune__images=100, finetune__crops=[24, 28], finetune__curve=[64, 150])
    assert stage("finetune", monkeypatch, "l1", "7") == ""
    train, validation, test = (data.load("data/fashion_mnist", name) for name in ("train", "validation", "test"))
    assert [(point["images"], point["seen"]) for point in points(cell)] == [(0, 0), (64, 64), (150, 128), (200, 192)]
    for place, images, epochs, crops in ((1, 64, 1, []), (2, 75, 2, []), (3, 100, 2, [24, 28])):
        recipe = config.load().finetune.model_copy(update={"epochs": epochs, "images": images, "crops": crops})
        network = checkpoint.load(cell / "pruned.safetensors")
        task = training.Task(network, train, validation, recipe, 7, "finetune")
        state = training.fit(task, training.State(), lambda now: None)
        assert points(cell)[place]["top1_test"] == top1(network, test)
        assert points(cell)[place]["top1_validation"] == state.history[-1]["validation_top1"]


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_killed_run_ends_with_the_same_bytes(study, monkeypatch, calls):
    """Killed at the end of the first epoch of each recovery; those that were finished do not run again."""
    cell = pruned(study, monkeypatch, "l1")
    set_params(study, finetune__epochs=2, finetune__curve=[64, 320])
    assert stage("finetune", monkeypatch, "l1", "7") == ""
    names = ("recovery.json", "recovered.safetensors")
    wanted = [(cell / name).read_bytes() for name in names]
    assert not (study / "artifacts/small/resume/l1-7").exists()
    for name in names:
        (cell / name).unlink()
    fit, started = training.fit, []

    def killed(task, state, save):
        started.append(task.recipe.epochs)
        if len(started) == calls:
            raise KeyboardInterrupt
        return fit(task, state, save)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "fit", killed)
        stage("finetune", patch, "l1", "7")
    assert not (cell / "recovery.json").exists()
    assert len(list((study / "artifacts/small/resume/l1-7").glob("*.json"))) == calls - 1
    monkeypatch.setattr(training, "fit", lambda *parts: started.append(0) or fit(*parts))
    assert stage("finetune", monkeypatch, "l1", "7") == ""
    assert started.count(0) == 3 - (calls - 1)
    assert [(cell / name).read_bytes() for name in names] == wanted


def test_a_curve_that_is_longer_than_the_recovery_is_refused(study, monkeypatch):
    cell = pruned(study, monkeypatch, "l1")
    set_params(study, finetune__curve=[64, 268])
    assert stage("finetune", monkeypatch, "l1", "7").startswith(
        "error: params.yaml: finetune.curve: 268 images are not fewer than the 268 of the study's recovery")
    assert not (cell / "recovery.json").exists()

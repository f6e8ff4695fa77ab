"""Every network of the zoo: groups, a cut that equals closed gates, MACs, a step of training, files."""

from __future__ import annotations

import copy
import math
import re

import numpy as np
import pytest
import torch

import networks_page
import zoo
from hobs_rspar import checkpoint, deployment, surgery
from hobs_rspar.allocation.space import floors
from hobs_rspar.networks import NetworkSpec, torchvision_models
from zoo import Cut

EXPORTED = "zoo:small_transformer"  # of the dozen; an export takes longer than everything else
CASES = [pytest.param(spec, spec.name == EXPORTED, id=spec.name) for spec in zoo.dozen()]
CASES += [pytest.param(spec, spec.name in zoo.FAMILIES or spec.name.startswith("timm:"), marks=pytest.mark.slow,
                       id=f"{spec.name}@{spec.image_size}") for spec in zoo.every()]


@pytest.mark.parametrize(("spec", "exported"), CASES)
def test_network(spec: NetworkSpec, exported: bool, tmp_path):
    """One network goes through all checks before the next is built: the largest take gigabytes."""
    if spec.name.startswith("timm:"):
        torchvision_models()  # timm imports torchvision
        pytest.importorskip("timm", reason="the optional extra 'networks' is not installed: make test-all installs it")
    cut = Cut(spec)
    budget_is_met(cut)
    cut_equals_closed_gates(cut)
    macs_are_pytorchs(cut)
    both_train(cut)
    files_hold_it(cut, tmp_path)
    if exported:
        exported_files_compute_the_same(cut, tmp_path)


def budget_is_met(cut: Cut) -> None:
    groups, ratio = cut.groups, cut.groups.macs(cut.widths) / cut.groups.dense_macs
    lowest = groups.macs(floors(groups, 0)) / groups.dense_macs
    assert ratio <= max(zoo.BUDGET, lowest + 0.01) * (1 + zoo.TOLERANCE)
    free = [not group.protected for group in groups]
    assert any(free)
    assert ((cut.widths < groups.sizes) & free).any()


def cut_equals_closed_gates(cut: Cut) -> None:
    from_gated, from_dense = zoo.deviation(cut)
    assert from_gated < zoo.CLOSE[zoo.precision(cut.dense)]
    assert from_dense > 1e-3, "the channels that were cut do nothing: the comparison would see no mistake"


def macs_are_pytorchs(cut: Cut) -> None:
    x = cut.images(1)
    assert zoo.counted(cut.dense, x) == cut.groups.dense_macs
    assert zoo.counted(cut.small, x) == cut.groups.macs(cut.widths)


def both_train(cut: Cut) -> None:
    loss, idle = zoo.stepped(cut.small, cut.images(4))
    assert math.isfinite(loss)
    assert idle == zoo.stepped(cut.dense, cut.images(4))[1]


def files_hold_it(cut: Cut, folder) -> None:
    checkpoint.save(folder / "cut.safetensors", cut.small, cut.spec)
    loaded = checkpoint.load(folder / "cut.safetensors")
    for name, tensor in cut.small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = cut.images(3)
    with torch.no_grad():
        assert torch.allclose(loaded(x), cut.small(x), rtol=1e-3, atol=1e-4 * float(cut.small(x).abs().max()))


def exported_files_compute_the_same(cut: Cut, folder) -> None:
    deployment.write(cut.small, cut.spec, folder)
    found = deployment.compared(cut.small, deployment.load(folder, 1), cut.images(5))
    assert set(found) == {"onnx", "torch_export"}


def test_a_wrong_cut_is_seen():
    """What the zoo rests on: other channels than the closed ones give other logits."""
    cut = Cut(zoo.dozen()[-2])
    right, _ = zoo.deviation(cut)
    wrong = copy.copy(cut)
    wrong.kept = [sorted((np.array(kept) + 1) % group.channels) for group, kept in zip(cut.groups, cut.kept)]
    assert right < 1e-8 and zoo.deviation(wrong)[0] > 1e-2


# --- the generated page

@pytest.mark.parametrize(("reason", "short"), [
    ("encoder.layers.encoder_layer_0.self_attention multiplies activations with activations (attention); write it as",
     "… multiplies activations with activations (attention)"),
    ("cut, in evaluation mode the network does not run (RuntimeError: shape '[3, 13]' is invalid for input of size 42)",
     "cut, in evaluation mode the network does not run (RuntimeError: shape '[n]' is invalid for input of size n)")])
def test_reasons_of_a_kind_are_the_same_on_the_page(reason: str, short: str):
    assert networks_page.shortened(reason, zoo.small_transformer(10)) == short


@pytest.mark.parametrize("name", ["zoo:small_convnext", "zoo:small_resnext"])
def test_the_page_knows_a_right_cut_from_a_wrong_one(name: str):
    """Layer norms and grouped convolutions: which channels are gone is read from what is left of the parameters."""
    cut = Cut(NetworkSpec(name, 10, 3, zoo.PIXELS))
    dense, x = networks_page.distinct(copy.deepcopy(cut.dense)), cut.images(3).double()
    small = surgery.sliced(dense, cut.groups, cut.kept)
    with torch.no_grad():
        assert networks_page.compared(dense, small, x, small(x)) == "equals masked"
        assert networks_page.compared(dense, small, x, dense(x)).startswith("differs from masked: logits by ")


def test_the_page_says_what_torch_pruning_does():
    cells = networks_page.limited(networks_page.theirs, NetworkSpec("zoo:small_densenet", 10, 3, zoo.PIXELS), 60)
    assert re.fullmatch(r"0\.\d\dx; equals masked; trains", *cells)


def test_what_takes_too_long_is_ended_and_said():
    spec = NetworkSpec("squeezenet1_1", 10, 3, zoo.PIXELS)

    def forever(spec: NetworkSpec) -> list[str]:
        while True:
            pass
    assert networks_page.limited(forever, spec, 1) == ["no answer within 1 CPU seconds and 12 GB"]

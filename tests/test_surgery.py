"""Groups, surgery and slicing: the pruned network is the dense one with the removed channels closed."""

import copy
import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hobs_rspar import checkpoint, cost, slicing, surgery
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.errors import UserError
from hobs_rspar.networks import NetworkSpec, build, torchvision_models
from hobs_rspar.plan import PruningPlan
from small import (
    IMAGES,
    ZOO,
    Joined,
    Mixed,
    assert_same,
    batch,
    plan_of,
    random_kept,
    rebuilt,
    seeded,
    snapshot,
    zoo,
    zoo_groups,
)

CASES = [("resnet20", seed) for seed in range(4)] + [(name, 0) for name in ZOO if name != "resnet20"]


@torch.no_grad()
def masked(network: nn.Module, groups: Groups, kept: list[list[int]], x: torch.Tensor) -> torch.Tensor:
    gates = Gates(groups)
    with gates.applied(network, gates.mask(kept)):
        return network(x)


def close(seen: torch.Tensor, wanted: torch.Tensor) -> bool:
    return bool((seen - wanted).abs().max() <= 1e-4 * wanted.abs().max())


# --- the pruned network equals the masked one

@pytest.mark.parametrize(("name", "seed"), CASES)
def test_pruned_network_is_the_masked_one(name, seed):
    network, groups, spec = zoo(name), zoo_groups(name), ZOO[name]
    before, kept, x = snapshot(network), random_kept(groups, seed), batch(spec)
    plan = plan_of(groups, kept, name)
    pruned = slicing.remove(network, groups, plan)
    wanted, dense = masked(network, groups, kept, x), network(x)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2 * wanted.abs().max()  # it still tells images apart
    assert not close(wanted, dense)  # and the removed channels mattered
    assert close(pruned(x), wanted)
    assert_same(before, snapshot(network))

    sliced = groups.sliced(network.state_dict(), kept)
    state = pruned.state_dict()
    assert sliced.keys() == state.keys()
    assert all(torch.equal(sliced[key], state[key]) for key in state)
    assert close(rebuilt(network, groups, kept)(x), wanted)
    assert plan.macs == cost.count(pruned, spec.example()).macs


@pytest.mark.parametrize("kind", [Mixed, Joined])
@pytest.mark.parametrize("seed", range(5))
def test_networks_of_a_users_own(kind, seed):
    network, x = seeded(kind), IMAGES
    groups = surgery.groups(network, x[:1])
    kept = random_kept(groups, seed, least=0)
    pruned = slicing.remove(network, groups, plan_of(groups, kept))
    assert close(pruned(x), masked(network, groups, kept, x))
    assert close(rebuilt(network, groups, kept)(x), pruned(x))
    assert int(groups.macs(np.array([len(k) for k in kept]))) == cost.count(pruned, x[:1]).macs


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "efficientnet_b0"])
def test_saved_and_loaded_without_its_plan(name, tmp_path):
    network, groups, spec = zoo(name), zoo_groups(name), ZOO[name]
    pruned = slicing.remove(network, groups, plan_of(groups, random_kept(groups, 5), name))
    checkpoint.save(tmp_path / "pruned.safetensors", pruned, spec)
    loaded, found = checkpoint.load_with_spec(tmp_path / "pruned.safetensors")
    x = batch(spec)
    assert found == spec
    assert torch.equal(loaded(x), copy.deepcopy(pruned).to(memory_format=torch.channels_last)(x))
    assert not loaded.training
    assert repr(loaded) == repr(pruned)
    wanted, again = pruned.state_dict(), loaded.state_dict()
    assert list(wanted) == list(again) and all(torch.equal(wanted[key], again[key]) for key in wanted)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    network, digests = zoo("resnet8"), set()
    for _ in range(20):
        checkpoint.save(tmp_path / "a.safetensors", network, ZOO["resnet8"])
        loaded = checkpoint.load(tmp_path / "a.safetensors")
        checkpoint.save(tmp_path / "b.safetensors", loaded, ZOO["resnet8"])
        digests |= {checkpoint.digest(tmp_path / f"{name}.safetensors") for name in "ab"}
    assert len(digests) == 1


def test_single_channels_survive_everywhere():
    network, groups, x = zoo("resnet20"), zoo_groups("resnet20"), batch(ZOO["resnet20"])
    kept = [[group.channels // 2] for group in groups]
    pruned = slicing.remove(network, groups, plan_of(groups, kept, "resnet20"))
    assert close(pruned(x), masked(network, groups, kept, x))
    assert cost.count(pruned, x[:1]).macs == groups.macs(np.ones(len(groups)))


def test_a_pruned_network_can_be_trained_and_traced_again():
    network, x = seeded(Mixed), IMAGES
    groups = surgery.groups(network, x[:1])
    pruned = slicing.remove(network, groups, plan_of(groups, random_kept(groups, 1)))
    again = surgery.groups(pruned, x[:1])
    assert again.sizes.tolist() == [len(kept) for kept in random_kept(groups, 1)]
    assert again.dense_macs == cost.count(pruned, x[:1]).macs
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


# --- groups

def test_groups_of_resnet20_are_the_streams_and_the_inner_channels():
    groups = zoo_groups("resnet20")
    names = [group.name for group in groups]
    assert len(groups) == 12 and groups.sizes.sum() == 448 and names[0] == "conv1"
    stream = groups.named("layer1.2.conv2")  # the stream of the first stage, under the name of its first producer
    assert stream.name == "conv1"
    producers = ["conv1"] + [f"layer1.{i}.conv2" for i in range(3)]
    consumers = [f"layer1.{i}.conv1" for i in range(3)] + ["layer2.0.conv1", "layer2.0.shortcut.0"]
    assert sorted(m.layer for m in stream.with_role("producer")) == sorted(producers)
    assert sorted(m.layer for m in stream.with_role("consumer")) == sorted(consumers)
    inner = groups.named("layer3.1.conv1")
    assert [(m.layer, m.role) for m in inner.members] == [("layer3.1.conv1", "producer"), ("layer3.1.bn1", "norm"),
                                                         ("layer3.1.conv2", "consumer")]
    assert [g.name for g in groups if any(m.layer == "linear" for m in g.with_role("consumer"))] == ["layer3.0.conv2"]
    assert not any(group.name == "linear" for group in groups)  # the classes stay


def test_indices_of_flattened_and_joined_layers():
    mixed = surgery.groups(seeded(Mixed), IMAGES[:1])
    flattened = next(m for m in mixed.named("down").members if m.layer == "hidden")
    assert flattened.index == tuple(tuple(range(25 * c, 25 * c + 25)) for c in range(5))
    joined = surgery.groups(seeded(Joined), IMAGES[:1])
    join = next(m for m in joined.named("right").members if m.layer == "join")
    assert join.index == tuple((4 + c,) for c in range(6))
    depthwise = mixed.named("expand")
    assert [m.layer for m in depthwise.with_role("depthwise")] == ["depthwise"]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vgg16_bn_cifar"])
def test_groups_survive_json(name):
    groups = zoo_groups(name)
    again = Groups.from_json(json.loads(json.dumps(groups.to_json())))
    assert list(again) == list(groups) and again.layers == groups.layers
    assert str(again) == str(groups)
    widths = np.array([len(kept) for kept in random_kept(groups, 0)])
    assert groups.macs(widths) == again.macs(widths)


def test_groups_with_odd_indices_survive_json():
    for kind in (Mixed, Joined):
        groups = surgery.groups(seeded(kind), IMAGES[:1])
        assert list(Groups.from_json(json.loads(json.dumps(groups.to_json())))) == list(groups)


def test_macs_of_many_widths_at_once():
    groups = zoo_groups("resnet8")
    widths = np.stack([[len(kept) for kept in random_kept(groups, seed)] for seed in range(6)]).reshape(2, 3, -1)
    together = groups.macs(widths)
    assert together.shape == (2, 3)
    assert together[1, 2] == groups.macs(widths[1, 2]) and len(set(together.flatten().tolist())) > 1
    assert groups.macs(groups.sizes) == groups.dense_macs


def test_protected_groups_stay_whole():
    groups = surgery.groups(zoo("resnet8"), ZOO["resnet8"].example(), ["layer1.0.conv2", "layer3.0.conv1"])
    assert {g.name for g in groups if g.protected} == {"conv1", "layer3.0.conv1"}
    assert "kept whole: as asked" in str(groups)
    with pytest.raises(UserError, match="'layer1.0.cnv1' is not a layer of CifarResNet. Did you mean 'layer1.0.conv1'"):
        surgery.groups(zoo("resnet8"), ZOO["resnet8"].example(), ["layer1.0.cnv1"])


def test_frozen_networks_have_the_same_groups():
    network = copy.deepcopy(zoo("resnet8"))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    assert list(surgery.groups(network, ZOO["resnet8"].example())) == list(zoo_groups("resnet8"))
    assert not any(p.requires_grad for p in network.parameters())


def test_groups_are_found_where_gradients_are_off():
    with torch.no_grad():
        assert list(surgery.groups(seeded(Mixed), IMAGES[:1])) == list(surgery.groups(seeded(Mixed), IMAGES[:1]))


def test_a_wrong_input_shape_is_a_message():
    with pytest.raises(UserError, match="'conv1' takes 1 channels"):
        surgery.groups(zoo("resnet8"), torch.zeros(1, 3, 28, 28))


# --- plans

def test_a_plan_survives_its_file(tmp_path):
    groups = zoo_groups("resnet8")
    plan = plan_of(groups, random_kept(groups, 1), "resnet8")
    plan.save(tmp_path / "cell" / "plan.json")
    again = PruningPlan.load(tmp_path / "cell" / "plan.json")
    assert again == plan and again.macs_ratio == plan.macs / groups.dense_macs
    again.check(groups)


def test_a_plan_for_another_network_is_refused():
    plan = plan_of(zoo_groups("resnet8"), random_kept(zoo_groups("resnet8"), 1), "resnet8")
    with pytest.raises(UserError, match="made for 'resnet8' with 6 groups, this network has 12"):
        plan.check(zoo_groups("resnet20"))
    with pytest.raises(UserError, match="the plan is for another network"):
        slicing.remove(seeded(Mixed), surgery.groups(seeded(Mixed), IMAGES[:1]), plan)


@pytest.mark.parametrize("kept", [
    [], [3, 1], [1, 1, 2], [0, 16], [-1, 3]])
def test_impossible_channels_are_refused(kept):
    groups = zoo_groups("resnet8")
    good = plan_of(groups, [list(range(g.channels)) for g in groups], "resnet8")
    bad = dataclasses.replace(good, groups=[dataclasses.replace(good.groups[0], kept=kept), *good.groups[1:]])
    with pytest.raises(UserError, match="group conv1: kept channels must be sorted, distinct and within 0 to 15"):
        bad.check(groups)


# --- the published front

def test_physical_pruner():
    network = zoo("resnet8")
    before = snapshot(network)
    x = batch(ZOO["resnet8"])
    plan = {"layer1.0.conv1": [0, 3, 15], "conv1": [1], "layer3.0.conv1": []}
    pruned = surgery.PhysicalPruner(network, x[:1]).prune(plan)
    groups = zoo_groups("resnet8")
    kept = [sorted(set(range(g.channels)) - set(plan.get(g.name, []))) for g in groups]
    assert close(pruned(x), masked(network, groups, kept, x))
    assert pruned.layer1[0].conv1.out_channels == 13 and pruned.conv1.out_channels == 15
    assert_same(before, snapshot(network))
    signature = inspect.signature(surgery.PhysicalPruner)
    assert list(signature.parameters) == ["model", "example_input"]


def test_physical_pruner_prunes_depthwise_and_linear_layers():
    x = IMAGES
    pruned = surgery.PhysicalPruner(seeded(Mixed), x[:1]).prune({"depthwise": [2, 5], "hidden": [0]})
    assert pruned.expand.out_channels == pruned.depthwise.groups == pruned.project.in_channels == 6
    assert pruned.hidden.out_features == pruned.out.in_features == 6
    assert pruned(x).shape == (5, 4)


def test_physical_pruner_takes_imagenet_images_by_default():
    pruned = surgery.PhysicalPruner(build(NetworkSpec("resnet8", 10, 3, 224))).prune({"layer2.0.conv1": [0]})
    assert pruned.layer2[0].conv1.out_channels == 31


@pytest.mark.parametrize(("plan", "message"), [
    ({"conv9": [0]}, "'conv9' is not a convolution or linear layer of CifarResNet; the plan is for another network"),
    ({"bn1": [0]}, "'bn1' is not a convolution"),
    ({"conv1": [16]}, "'conv1' has 16 filters; indices must be within 0 to 15"),
    ({"conv1": [-1]}, "'conv1' has 16 filters; indices must be within 0 to 15"),
    ({"conv1": list(range(16))}, "at least one must stay"),
    (None, "give a dictionary {layer name: indices of the filters to remove}; seen: NoneType"),
    ([("conv1", [1])], "seen: list"),
    ({"conv1": 3}, "'conv1' takes a list of filters to remove; seen: 3"),
    ({"conv1": "12"}, "'conv1' takes a list of filters to remove; seen: '12'"),
    ({"conv1": [[1, 2]]}, r"'conv1' takes whole numbers of filters to remove; seen: \[1, 2\]"),
    ({"conv1": [0.5]}, "'conv1' takes whole numbers of filters to remove; seen: 0.5"),
    ({"conv1": [False] * 12 + [True] * 4}, "seen: False; of a mask give its indices"),
    ({"conv1": np.arange(16) > 3}, "seen: False; of a mask give its indices"),
])
def test_physical_pruner_refuses(plan, message):
    with pytest.raises(UserError, match=message):
        surgery.PhysicalPruner(zoo("resnet8"), ZOO["resnet8"].example()).prune(plan)


@pytest.mark.parametrize("filters", [(0, 3), {3, 0}, range(0, 4, 3), np.array([0, 3]), torch.tensor([3, 0, 0])])
def test_physical_pruner_takes_any_collection_of_indices(filters):
    pruned = surgery.PhysicalPruner(zoo("resnet8"), ZOO["resnet8"].example()).prune({"layer1.0.conv1": filters})
    assert pruned.layer1[0].conv1.out_channels == 14


def test_physical_pruner_runs_what_it_made():
    class Squeezed(nn.Module):
        """Loses the batch where one channel is left."""

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean((2, 3)).squeeze(1))

    pruner = surgery.PhysicalPruner(Squeezed(), torch.randn(1, 3, 9, 9))
    assert pruner.prune({"conv": range(6)}).fc.in_features == 2
    with pytest.raises(UserError, match="plan: Squeezed does not run with the channels that it leaves; leave more"):
        pruner.prune({"conv": range(7)})


def test_coupled_layers_named_twice_are_cut_once():
    pruner = surgery.PhysicalPruner(zoo("resnet8"), ZOO["resnet8"].example())
    once, twice = pruner.prune({"conv1": [0, 1]}), pruner.prune({"conv1": [0, 1], "layer1.0.conv2": [0, 1]})
    assert twice.conv1.out_channels == once.conv1.out_channels == 14
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values()))


def test_depthwise_layers_named_beside_their_producer_are_cut_once():
    pruner = surgery.PhysicalPruner(seeded(Mixed), IMAGES[:1])
    once = pruner.prune({"expand": [1, 4, 6]})
    for plan in ({"expand": [1, 4], "depthwise": [4, 6]}, {"depthwise": [1, 4, 6], "expand": [1]}):
        twice = pruner.prune(plan)
        assert twice.expand.out_channels == twice.depthwise.groups == 5
        assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), twice.state_dict().values()))


# --- MACs

def test_macs_are_half_of_pytorchs_own_flops():
    network, x = zoo("resnet20"), ZOO["resnet20"].example()
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert cost.count(network, x).macs == counter.get_total_flops() // 2
    assert cost.count(network, torch.zeros(5, 1, 28, 28)).macs == cost.count(network, x).macs  # of one image


@pytest.mark.parametrize(("name", "weights"), [("resnet50", "ResNet50_Weights"), ("resnet18", "ResNet18_Weights"),
                                               ("mobilenet_v2", "MobileNet_V2_Weights"),
                                               ("efficientnet_b0", "EfficientNet_B0_Weights")])
def test_macs_and_parameters_as_published(name, weights):
    published = getattr(torchvision_models(), weights).IMAGENET1K_V1.meta
    with torch.device("meta"):
        network = build(NetworkSpec(name, 1000, 3, 224))
        counted = cost.count(network, torch.zeros(1, 3, 224, 224))
    assert counted.params == published["num_params"]
    assert counted.macs / 1e9 == pytest.approx(published["_ops"], rel=5e-3)


def test_macs_by_hand():
    found = cost.layer_macs(seeded(Mixed), IMAGES[:1])
    assert found == {"stem": 81 * 6 * 2 * 9, "expand": 81 * 8 * 6, "depthwise": 81 * 8 * 9, "project": 81 * 6 * 8,
                     "down": 25 * 5 * 6 * 9, "hidden": 125 * 7, "out": 28}


def test_counting_leaves_the_network_as_it_was():
    network = seeded(Mixed).train()
    before = copy.deepcopy(network.state_dict())
    cost.count(network, IMAGES[:1])
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in network.modules())
    assert network.training and network.down.training


def test_counting_leaves_a_frozen_batch_norm_frozen():
    network = seeded(Mixed).train()
    network.stem_bn.eval()
    cost.count(network, IMAGES[:1])
    assert not network.stem_bn.training and network.expand_bn.training

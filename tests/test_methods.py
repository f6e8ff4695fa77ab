"""One contract for all methods: budget met, valid plan, the same for the same seed, inputs untouched, no test data."""

import copy
import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hobs_rspar import config, cost, slicing, surgery, training
from hobs_rspar.config import available_methods, method_options
from hobs_rspar.coupling import Member
from hobs_rspar.curvature.gates import Gates, gate_gradients
from hobs_rspar.curvature.oracle import loss_changes
from hobs_rspar.curvature.statistics import collect
from hobs_rspar.errors import UserError
from hobs_rspar.methods import _registry, _rspar
from hobs_rspar.methods._protocol import FileInputs
from hobs_rspar.plan import PruningPlan
from small import (
    ZOO,
    assert_same,
    context,
    images,
    rebuilt,
    snapshot,
    statistics_of,
    trained,
    zoo,
    zoo_groups,
)

QUICK = {"first": 4, "rounds": 1, "measured": 1, "iterations": 1, "episodes": 2, "hidden": 16, "images": 1000,
         "epochs": 1}
SEARCHED = ["hobs_rspar", "hobs_rspar_ppo", "hobs_rspar_dqn", "hobs_rspar_no_curvature", "hobs_rspar_first_order",
            "hobs_rspar_no_repair", "hobs_rspar_no_penalty"]
TRAINED = dict.fromkeys(("depgraph", "structalign", "structalign_seed", "bilevel", "bilevel_seed", "jtp_seed",
                         "scratch", "taylor", "decore", "autocompress"),
                        {"images": 32, "batch_size": 16})  # they train, kept short
TRAINED["scratch"] = TRAINED["depgraph"] | {"search": QUICK}
TRAINED["jtp"] = TRAINED["depgraph"] | {"rounds": 2, "episodes": 2, "updates": 2, "held_out": 32, "hidden": 16}
TRAINED["autocompress"] = TRAINED["depgraph"] | {"rounds": 2, "iterations": 1, "held_out": 32}
TRAINED["taylor"] = TRAINED["taylor"] | {"every": 1}
WEIGHTS_ONLY = ["unpruned", "random", "random_repair", "l1", "l1_repair", "l2_global", "fpgm", "lamp", "depgraph_seed",
                "udfc", "udfc_seed", "hrank"]  # and images
SHORT = dict.fromkeys(SEARCHED, QUICK) | TRAINED | {
    "hrank": {"images": 16}, "amc": {"episodes": 3, "random": 1, "images": 1000},
    "gnn": {"updates": 2, "episodes": 2, "images": 1000}}


# One for each way to widths: uniform, one threshold, trained gates, a search. What varies with network and budget is
# the space of widths, groups and surgery, not the method: `make test-all` runs the full product.
REPRESENTATIVES = ("l1", "l2_global", "structalign", "hobs_rspar")


def product(firsts: list, methods: list[str]) -> list:
    """All pairs; those beyond the first of ``firsts`` are slow, but for the representatives."""
    return [pytest.param(first, method, marks=() if first == firsts[0] or method in REPRESENTATIVES else
                         pytest.mark.slow) for first in firsts for method in methods]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Every step ranks the whole network anew."""
    monkeypatch.setattr(_registry.method("depgraph"), "STEPS", 4)
    monkeypatch.setattr(_registry.method("autocompress"), "COOLING", 0.1)


def decide(name: str, where) -> PruningPlan:
    return _registry.method(name).plan(where, _registry.options(name, SHORT.get(name, {})))


def assert_valid(plan: PruningPlan, name: str, where) -> None:
    """The plan says what surgery gives, and the budget is met."""
    spec, groups = ZOO[name], where.groups
    plan.check(groups)
    pruned = slicing.remove(where.network, groups, plan)
    counted = cost.count(pruned, spec.example()).macs
    assert plan.macs == counted and plan.dense_macs == cost.count(where.network, spec.example()).macs
    if plan.method != "unpruned":
        assert abs(counted / plan.dense_macs - where.space.budget) <= 0.01 * where.space.budget
        least = [max(1, int(np.ceil(where.space.min_ratio * size - 1e-9))) for size in groups.sizes]
        assert all(len(kept) >= fewest for kept, fewest in zip(plan.kept, least))
    assert (plan.method, plan.seed, plan.budget) == (where.method, where.seed, {"macs": where.space.budget})
    assert all(group.reason for group in plan.groups) and plan.decided_by


@pytest.mark.parametrize(("budget", "method"), product([0.26, 0.6], available_methods()))
def test_contract(budget, method, tmp_path):
    where = context("resnet8", method, budget=budget)
    before = snapshot(where.network)
    parts = copy.deepcopy(where.inputs.parts)
    pixels = {name: (split.pixels.clone(), split.labels.clone()) for name, split in where.inputs.splits.items()}
    plan = decide(method, where)
    assert_valid(plan, "resnet8", where)
    assert_same(before, snapshot(where.network))
    for name, tensors in parts.items():
        assert tensors.keys() == where.inputs.parts[name].keys()
        assert all(torch.equal(tensor, where.inputs.parts[name][key]) for key, tensor in tensors.items())
    assert all(torch.equal(a, b) for name, split in where.inputs.splits.items()
               for a, b in zip(pixels[name], (split.pixels, split.labels)))
    assert where.inputs.asked() <= {"train", "calibration", "validation"}
    if method in SEARCHED:  # they gain nothing by the tolerance
        assert plan.macs <= max(where.space.target, where.groups.macs(where.space.uniform))
    again = decide(method, context("resnet8", method, budget=budget))
    assert again == plan
    assert (plan.extra_training_images > 0) == (method in TRAINED)
    assert (plan.weights is not None) == (method in (*TRAINED, "udfc"))
    for name, tensor in (plan.weights or {}).items():
        assert torch.equal(tensor, again.weights[name])
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("name", "method"), product(
    ["resnet20", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "vgg16_bn_cifar"],
    [*WEIGHTS_ONLY, *(name for name in TRAINED if name != "scratch")]))
def test_contract_on_other_networks(name, method):
    where = context(name, method, budget=0.4, parts={})
    assert_valid(decide(method, where), name, where)


@pytest.mark.parametrize("method", ["taylor_oneshot", "hobs_uniform"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_contract_on_other_networks_with_given_scores(name, method):
    """Scores are given, because the eliminations of these networks take long; the allocation is what is tested."""
    total, random = int(zoo_groups(name).sizes.sum()), torch.Generator().manual_seed(0)
    gates = {"hobs": torch.rand(total, generator=random), "true_rows": torch.randn(70, total, generator=random)}
    where = context(name, method, budget=0.4, parts={"gates": gates})
    plan = decide(method, where)
    assert_valid(plan, name, where)


def test_every_method_is_known_and_says_what_it_is():
    assert set(available_methods()) >= {"unpruned", "random", "random_repair", "l1", "l1_repair", "l2_global",
                                        "fpgm", "lamp", "udfc_seed", "taylor_oneshot", "depgraph_seed",
                                        "hobs_uniform", *SEARCHED}
    for name in available_methods():
        module = _registry.method(name)
        assert module.__doc__.strip() and set(module.Options.model_fields) == method_options(name)
        assert _registry.options(name, {}) == module.Options()


@pytest.mark.parametrize("name", SEARCHED)
def test_the_ablation_searches_as_the_default_study_does(name):
    """The variants' blocks are empty: the defaults of the code must be the numbers of params.yaml."""
    blocks = config.load(Path(__file__).resolve().parents[1] / "configs/default.yaml").methods
    assert _registry.options(name, blocks[name]) == _registry.options("hobs_rspar", blocks["hobs_rspar"])


@pytest.mark.parametrize("method", [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.slow)
                                    for name in available_methods()])
def test_a_protected_group_stays_whole(method):
    groups = surgery.groups(zoo("resnet8"), ZOO["resnet8"].example(), ["layer2.0.conv1"])
    where = context("resnet8", method, budget=0.6)
    where.space = replace(where.space, groups=groups, expense=None)
    kept = {group.name: group for group in decide(method, where).groups}["layer2.0.conv1"]
    assert kept.kept == list(range(32)) and kept.reason == "kept whole: as asked"


# --- known answers

def test_unpruned_keeps_everything():
    plan = decide("unpruned", context("resnet8", "unpruned"))
    assert all(len(group.kept) == group.channels for group in plan.groups)
    assert plan.macs_ratio == 1 and plan.repair == "none" and plan.search is None


def test_random_depends_on_the_seed_and_on_nothing_else():
    plans = [decide("random", context("resnet8", "random", seed=seed)).kept for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]
    assert [len(kept) for kept in plans[0]] == [len(kept) for kept in plans[2]]  # widths are uniform for all seeds
    for method in ("l1", "l2_global", "fpgm", "lamp", "udfc_seed", "depgraph_seed", "hobs_uniform", "taylor_oneshot"):
        kept = [decide(method, context("resnet8", method, seed=seed)).kept for seed in (1, 2)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("method", ["random", "l1"])
def test_repaired_controls_differ_by_repair_alone(method):
    plain, repaired = (decide(name, context("resnet8", name)) for name in (method, f"{method}_repair"))
    assert repaired.kept == plain.kept and (plain.repair, repaired.repair) == ("none", "least_squares")


def test_uniform_methods_share_their_widths():
    widths = {method: [len(kept) for kept in decide(method, context("resnet8", method)).kept]
              for method in ("random", "l1", "fpgm", "udfc_seed", "depgraph_seed", "hobs_uniform")}
    assert len({tuple(value) for value in widths.values()}) == 1


def ranking(where, scores: list[np.ndarray], plan: PruningPlan) -> None:
    """In every group the kept channels are those with the highest scores."""
    for score, group in zip(scores, plan.groups):
        assert group.kept == sorted(np.argsort(-score, kind="stable")[:len(group.kept)].tolist())


def filter_sums(where, power: int, roles: tuple[str, ...]) -> list[np.ndarray]:
    """Norms by a loop over channels and members."""
    state = {name: tensor.numpy().astype(float) for name, tensor in where.network.state_dict().items()}
    scores = []
    for group in where.groups:
        total = np.zeros(group.channels)
        for member in group.with_role(*roles):
            weight = np.abs(state[f"{member.layer}.weight"]) ** power
            for channel in range(group.channels):
                index = list(member.index[channel])
                total[channel] += (weight[:, index] if member.role == "consumer" else weight[index]).sum()
        scores.append(total ** (1 / power))
    return scores


def test_l1_ranks_by_the_sum_of_its_producers():
    where = context("resnet8", "l1")
    ranking(where, filter_sums(where, 1, ("producer", "depthwise")), decide("l1", where))


def test_depgraph_seed_ranks_by_the_norm_of_the_whole_group():
    where = context("resnet8", "depgraph_seed")
    ranking(where, filter_sums(where, 2, ("producer", "depthwise", "norm", "consumer")), decide("depgraph_seed", where))


def test_l2_global_has_one_threshold_on_norms_relative_to_the_group():
    where = context("resnet8", "l2_global", budget=0.5)
    plan = decide("l2_global", where)
    scores = [score / score.mean() for score in filter_sums(where, 2, ("producer",))]
    ranking(where, scores, plan)
    threshold = np.sort(np.concatenate(scores))
    low = np.ceil(0.1 * where.groups.sizes - 1e-9).astype(int)
    for value in threshold:  # the lowest threshold that meets the budget
        widths = np.maximum([int((score > value).sum()) for score in scores], low)
        if where.groups.macs(widths) <= 0.5 * where.groups.dense_macs:
            break
    seen = np.array([len(kept) for kept in plan.kept])
    assert np.abs(seen - widths).sum() <= 1  # completion may move a channel
    assert len(set((seen / where.groups.sizes).round(1))) > 1


def test_fpgm_ranks_by_the_distance_to_the_other_filters():
    where, scores = context("resnet8", "fpgm"), []
    state = {name: tensor.numpy().astype(float) for name, tensor in where.network.state_dict().items()}
    for group in where.groups:
        total = np.zeros(group.channels)
        for member in group.with_role("producer", "depthwise"):
            filters = state[f"{member.layer}.weight"].reshape(len(state[f"{member.layer}.weight"]), -1)
            total += [sum(np.linalg.norm(filters[index[0]] - other) for other in filters) for index in member.index]
        scores.append(total)
    ranking(where, scores, decide("fpgm", where))


def test_fpgm_removes_what_the_others_can_replace():
    """Two equal filters beside large and small ones that differ: one of the twins goes, however large."""
    layer = torch.nn.Conv2d(1, 5, 1, bias=False)
    layer.weight.data = torch.tensor([9.0, 3.0, 3.1, -8.0, 3.0])[:, None, None, None]
    group = type(zoo_groups("resnet8")[0])("layer", 5, (Member("layer", "producer", tuple((i,) for i in range(5))),))
    found = _registry.method("fpgm").distances(torch.nn.ModuleDict({"layer": layer}), group)
    assert found.argsort().tolist()[:3] in ([1, 4, 2], [4, 1, 2]) and found.argmax() == 3


def test_depgraph_pulls_as_the_derivative_of_its_penalty():
    """Against autograd of the sum over groups of gamma_k / 2 times the squared norm of channel k, gamma held fixed."""
    depgraph, groups = _registry.method("depgraph"), zoo_groups("resnet8")
    network, reference = copy.deepcopy(zoo("resnet8")), copy.deepcopy(zoo("resnet8"))
    options = depgraph.Options(strength=0.3, alpha=3.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    depgraph.pull(network, groups, options)
    penalty = 0
    for group in groups:
        squared = []
        for channel in range(group.channels):
            weights = [(reference.get_submodule(m.layer).weight, m) for m in group.members]
            squared.append(sum((w[:, list(m.index[channel])] if m.role == "consumer" else w[list(m.index[channel])])
                               .square().sum() for w, m in weights))
        values = torch.stack(squared)
        fixed = values.detach().double()
        gamma = 2 ** (3.0 * (fixed.max() - fixed) / (fixed.max() - fixed.min()))
        penalty = penalty + 0.3 * (gamma * values).sum() / 2
    penalty.backward()
    for (name, ours), theirs in zip(network.named_parameters(), reference.parameters()):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert torch.allclose(ours.grad, wanted, rtol=1e-4, atol=1e-6), name
    assert depgraph.strengths(torch.tensor([2.0, 2.0]), 4.0).tolist() == [1, 1]  # equal norms: no division by zero


def test_depgraph_trains_weak_channels_away_and_keeps_strong_ones():
    """Planted: weights of a few channels almost zero, those of another few doubled; sparse training and its plan."""
    where, weak, strong = context("resnet8", "depgraph", budget=0.6), [2, 7, 11], [4, 9]
    where.network = copy.deepcopy(where.network)
    group = where.groups.named("layer2.0.conv1")
    with torch.no_grad():
        for member in group.members:
            weight = where.network.get_submodule(member.layer).weight
            part = weight.transpose(0, 1) if member.role == "consumer" else weight
            part[member.of(weak)] *= 0.1
            part[member.of(strong)] *= 2
    depgraph = _registry.method("depgraph")
    plan = depgraph.plan(where, depgraph.Options(images=96, batch_size=16, strength=0.3))
    kept = set(next(part for part in plan.groups if part.name == group.name).kept)
    assert not kept & set(weak) and kept >= set(strong)
    filters = {name: state["layer2.0.conv1.weight"].flatten(1).norm(dim=1) for name, state in
               (("before", where.network.state_dict()), ("after", plan.weights))}
    left = filters["after"] / filters["before"]
    assert left[weak].max() < 0.9 * left[strong].min() and plan.extra_training_images == 96


@pytest.mark.parametrize(("name", "count"), [("structalign", 1920), ("bilevel", 960)])
def test_learnt_gates_close_dead_channels_and_keep_vital_ones(name, count, monkeypatch):
    """Dead: always zero. Vital: those whose closing costs a trained network most, by brute force.

    Structalign's gates need so many steps to part by more than the noise of their sampling, in bf16 and in fp32.
    """
    data = images(640, 1, 28, 10)
    network = trained(copy.deepcopy(zoo("resnet8")), data, epochs=2)
    groups, dead = zoo_groups("resnet8"), [3, 12, 20, 31]
    network.layer3[0].bn1.weight.data[dead], network.layer3[0].bn1.bias.data[dead] = 0, -1
    where = context("resnet8", name, budget=0.5)
    where.network, where.inputs.splits["train"] = network, data
    index = [group.name for group in groups].index("layer3.0.conv1")
    changes = loss_changes(network, groups, data.first(128), 64).split(groups.sizes.tolist())[index]
    vital, module, found = changes.argsort()[-4:], _registry.method(name), []
    gated = importlib.import_module("hobs_rspar.methods._gated")
    for place in {gated, module}:
        monkeypatch.setattr(place, "planned", lambda _context, logits, *_: found.append(logits), raising=False)
    module.plan(where, module.Options(images=count, batch_size=16))
    logits = found[0].split(groups.sizes.tolist())[index]
    assert changes[dead].abs().max() < 1e-6 and logits[dead].max() < logits[vital].min()


def test_masks_of_dead_channels_shrink_first():
    """Only the L1 norm pulls at a channel that is always zero; those whose closing costs most hold against it, most."""
    data = images(640, 1, 28, 10)
    network = trained(copy.deepcopy(zoo("resnet8")), data, epochs=2)
    groups, dead = zoo_groups("resnet8"), [3, 12, 20, 31]
    network.layer3[0].bn1.weight.data[dead], network.layer3[0].bn1.bias.data[dead] = 0, -1
    where = context("resnet8", "bilevel_seed", budget=0.5)
    where.network, where.inputs.splits["train"], where.inputs.splits["calibration"] = network, data, data
    index = [group.name for group in groups].index("layer3.0.conv1")
    vital = loss_changes(network, groups, data.first(128), 64).split(groups.sizes.tolist())[index].argsort()[-4:]
    options = _registry.options("bilevel_seed", {"images": 640, "batch_size": 32})
    kept = set(_registry.method("bilevel_seed").plan(where, options).kept[index])
    assert not kept & set(dead) and len(kept & set(vital.tolist())) >= 3


def test_thresholds_close_filters_that_are_small_beside_their_group():
    where, small, large = context("resnet8", "jtp_seed", budget=0.6), [2, 7, 11], [4, 9]
    where.network = copy.deepcopy(where.network)
    for channels, factor in ((small, 0.05), (large, 3)):
        where.network.get_submodule("layer2.0.conv1").weight.data[channels] *= factor
    plan = _registry.method("jtp_seed").plan(where, _registry.options("jtp_seed", {"images": 96,
                                                                                       "batch_size": 16}))
    kept = set(next(part for part in plan.groups if part.name == "layer2.0.conv1").kept)
    assert not kept & set(small) and kept >= set(large)


def test_misalignment_is_the_divergence_of_neighbouring_vectors():
    """Against numpy for vectors of equal length, which resampling leaves alone; 0 where all are alike, in any order."""
    misalignment, random = _registry.method("structalign_seed").misalignment, np.random.default_rng(0)
    first, second = (torch.from_numpy(random.normal(size=32)) for _ in range(2))
    p, q = (np.exp(np.sort(part.numpy())) / np.exp(part.numpy()).sum() for part in (first, second))
    assert misalignment((first, second)).item() == pytest.approx((p * np.log(p / q)).sum())
    assert misalignment((first, first.flip(0), first)).item() == pytest.approx(0, abs=1e-12)
    assert misalignment((torch.ones(8), torch.ones(64))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_jtp_aligns_what_the_mask_removes(name):
    """The pull is the sum over layers of the norm of their removed filters; nothing else has a gradient."""
    jtp, groups, network = _registry.method("jtp"), zoo_groups(name), copy.deepcopy(zoo(name))
    mask = (torch.rand(int(groups.sizes.sum()), generator=torch.Generator().manual_seed(0)) > 0.3).float()
    jtp.misaligned(network, groups, mask).backward()
    wanted = {layer: torch.zeros_like(network.get_submodule(layer).weight) for layer in groups.layers}
    for group, kept in zip(groups, mask.split(groups.sizes.tolist())):
        for member in group.with_role("producer", "depthwise"):
            weight, gone = network.get_submodule(member.layer).weight.detach(), torch.tensor(
                member.of((kept == 0).nonzero()[:, 0].tolist()), dtype=torch.long)
            wanted[member.layer][gone] += weight[gone] / weight[gone].norm().clamp_min(1e-12)
    for layer, gradient in wanted.items():
        found = network.get_submodule(layer).weight.grad
        assert torch.allclose(torch.zeros_like(gradient) if found is None else found, gradient, atol=1e-6), layer


def test_jtp_rewards_a_choice_with_the_accuracy_of_the_network_without_those_channels():
    jtp, where = _registry.method("jtp"), context("resnet8", "jtp", budget=0.5)
    guide = jtp.Guide(where, jtp.Options(held_out=128, hidden=16))
    mask = guide.masks(where.network, where.space.uniform[None])[0]
    sizes = where.groups.sizes.tolist()
    assert [int(part.sum()) for part in mask.split(sizes)] == where.space.uniform.tolist()
    kept = [part.nonzero()[:, 0].tolist() for part in mask.split(sizes)]
    ranking(where, filter_sums(where, 2, ("producer",)),
            where.keep_best([part.double() for part in mask.split(sizes)], where.space.uniform, "test"))
    network = copy.deepcopy(where.network)
    network.load_state_dict(where.network.state_dict())
    for group, channels in zip(where.groups, kept):
        for member in group.with_role("consumer"):
            gone = member.of(sorted(set(range(group.channels)) - set(channels)))
            network.get_submodule(member.layer).weight.data[:, gone] = 0
    images = where.calibration
    assert guide.reward(where.network, mask) == pytest.approx(
        training.accuracy(training.logits(network, images, "bf16"), images.labels) / 100, abs=0.02)


def test_sampled_gates_are_binary_with_the_gradient_of_the_sigmoid():
    gated = importlib.import_module("hobs_rspar.methods._gated")
    logits = torch.linspace(-3, 3, 2000).requires_grad_()
    value = gated.sampled(logits, torch.Generator().manual_seed(0))
    assert set(value.tolist()) <= {0.0, 1.0} and (logits.grad is None)
    for low, high in ((-3, -2), (-0.5, 0.5), (2, 3)):  # open as often as the logit says
        some = (logits >= low) & (logits < high)
        assert value[some].mean().item() == pytest.approx(torch.sigmoid(logits[some]).mean().item(), abs=0.05)
    value.sum().backward()
    noise = torch.rand(2000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6).logit()
    soft = torch.sigmoid((logits.detach() + noise) / 0.4)
    assert torch.allclose(logits.grad, soft * (1 - soft) / 0.4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_macs_of_gates_are_those_of_the_pruned_network(name):
    gated, groups = importlib.import_module("hobs_rspar.methods._gated"), zoo_groups(name)
    macs, random = gated.Macs(groups, torch.device("cpu")), torch.Generator().manual_seed(0)
    for _ in range(3):
        value = macs.opened((torch.rand(int(groups.sizes.sum()), generator=random) > 0.4).float())
        widths = np.array([int(part.sum()) for part in value.split(groups.sizes.tolist())])
        assert macs.ratio(value).item() == pytest.approx(int(groups.macs(widths)) / groups.dense_macs, rel=1e-4)
    assert macs.overshoot(value, 1.0).item() == 0
    assert macs.overshoot(value, 0.01).item() == pytest.approx(np.log(macs.ratio(value).item() / 0.01), rel=1e-4)


def test_the_partial_lasso_shrinks_the_filters_of_closed_gates():
    structalign, groups = _registry.method("structalign"), zoo_groups("resnet8")
    network, before = copy.deepcopy(zoo("resnet8")), zoo("resnet8")
    value = torch.ones(int(groups.sizes.sum()))
    start = int(groups.sizes[:[group.name for group in groups].index("layer2.0.conv1")].sum())
    value[start:start + 8] = 0  # a quarter of the group
    structalign.shrink(network, groups, value, 0.4)
    for (name, after), old in zip(network.named_parameters(), before.parameters()):
        if name != "layer2.0.conv1.weight":
            assert torch.equal(after, old), name
    norms, old = (net.layer2[0].conv1.weight.flatten(1).norm(dim=1) for net in (network, before))
    assert torch.allclose(norms[:8], (old[:8] - 0.4 * 8 / 32).clamp_min(0), atol=1e-5)
    assert torch.equal(norms[8:], old[8:])


def test_lamp_scores_are_those_of_the_paper():
    share = _registry.method("lamp").share_of_the_rest
    assert share(torch.tensor([4.0, 1.0, 5.0])).tolist() == pytest.approx([4 / 9, 1 / 10, 1])
    equal = share(torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert equal.tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])  # as if the first had gone before the second
    where = context("resnet8", "lamp", budget=0.5)
    scores = [share(torch.from_numpy(part).square()).numpy() for part in filter_sums(where, 2, ("producer",))]
    plan = decide("lamp", where)
    ranking(where, scores, plan)
    assert len({round(len(group.kept) / group.channels, 1) for group in plan.groups}) > 1


@pytest.mark.parametrize("bias", [False, True])
def test_udfc_solves_the_papers_least_squares(bias):
    """Against numpy, filter by filter; the division by gamma as in the paper, whose convolutions have no bias."""
    udfc, random = _registry.method("udfc"), np.random.default_rng(0)
    layer, norm = torch.nn.Conv2d(3, 9, 3, bias=bias), torch.nn.BatchNorm2d(9).eval()
    for tensor in (norm.weight.data, norm.running_var):
        tensor.copy_(torch.from_numpy(random.uniform(0.5, 2, 9)))
    for tensor in (norm.bias.data, norm.running_mean):
        tensor.copy_(torch.from_numpy(random.normal(size=9)))
    kept, gone, alpha = torch.tensor([0, 2, 3, 7]), torch.tensor([1, 4, 5, 6, 8]), 0.3
    found = udfc.coefficients(layer, norm, kept, gone, alpha).detach().numpy()
    weight = layer.weight.detach().double().numpy().reshape(9, -1)
    gamma, beta, mean = (t.detach().double().numpy() for t in (norm.weight, norm.bias, norm.running_mean))
    sigma = np.sqrt(norm.running_var.double().numpy() + norm.eps)
    constant = beta - gamma * (mean - (layer.bias.detach().double().numpy() if bias else 0)) / sigma
    for row, j in zip(found, gone.tolist()):
        columns = np.stack([gamma[i] * sigma[j] / (sigma[i] * gamma[j]) * weight[i] for i in kept.tolist()], 1)
        stacked = np.vstack([columns, np.sqrt(alpha) * constant[kept.numpy()][None]])
        wanted = np.linalg.lstsq(stacked, np.append(weight[j], np.sqrt(alpha) * constant[j]), rcond=None)[0]
        assert row == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def test_udfc_loses_nothing_where_a_removed_filter_is_a_multiple_of_a_kept_one():
    """Half of a group's filters are half of the others: plainly pruned the output changes, compensated it does not."""
    network, groups, udfc = copy.deepcopy(zoo("resnet8")), zoo_groups("resnet8"), _registry.method("udfc")
    group, layer, norm = groups.named("layer2.0.conv1"), network.layer2[0].conv1, network.layer2[0].bn1
    layer.weight[16:] = 0.5 * layer.weight[:16]
    for tensor, factor in ((norm.running_mean, 0.5), (norm.running_var, 0.25), (norm.weight, 0.5), (norm.bias, 0.5)):
        tensor[16:] = factor * tensor[:16]
    x, plain = images(8, 1, 28, 10), copy.deepcopy(network)
    wanted = network(x.normalised(x.pixels))
    udfc.fold(network, group, torch.arange(16), torch.arange(16, 32), 0.01)
    for net in (network, plain):
        for member in group.with_role("consumer"):
            net.get_submodule(member.layer).weight[:, 16:] = 0
    assert torch.allclose(network(x.normalised(x.pixels)), wanted, atol=1e-2 * wanted.std())
    assert (plain(x.normalised(x.pixels)) - wanted).abs().max() > 0.1 * wanted.std()


def test_udfc_seed_strides_down_the_ranking():
    strided = _registry.method("udfc_seed").strided
    norms = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 0.0])
    assert strided(norms, 3).nonzero()[:, 0].tolist() == [0, 1, 4]  # every second: norms 5, 3 and 1
    assert strided(norms, 4).nonzero()[:, 0].tolist() == [0, 2, 3, 4]  # more than half: the largest
    where = context("resnet8", "udfc_seed", budget=0.6)
    assert decide("udfc_seed", where).kept == decide("l1", context("resnet8", "l1", budget=0.6)).kept


def dead_channels(name: str = "resnet8", count: int = 4):
    """A network some of whose channels are always zero after the activation, its groups and its statistics."""
    network, groups = copy.deepcopy(zoo(name)), zoo_groups(name)
    dead = {"layer1.0.conv1": [1, 5, 8, 13][:count], "layer3.0.conv1": [0, 17, 40, 63][:count]}
    with torch.no_grad():
        for layer, channels in dead.items():
            norm = network.get_submodule(layer.replace("conv1", "bn1"))
            norm.weight[channels], norm.bias[channels] = 0, -1
            network.get_submodule(layer).weight[channels] *= 50  # large filters: magnitude must not see through it
    return network, groups, dead


@pytest.mark.parametrize("method", ["taylor_oneshot", "hobs_uniform", "hobs_rspar"])
def test_dead_channels_go_first(method):
    network, groups, dead = dead_channels()
    where = context("resnet8", method, budget=0.7)  # at 0.85, a search may well take all from one group
    options = type("Options", (), {"batch_size": 64, "positions": 20, "damping": 1e-3})
    gates, factors = collect(network, groups, where.calibration, options, torch.Generator().manual_seed(0))
    where.network, where.inputs.parts["gates"], where.inputs.parts["factors"] = network, gates, factors
    plan = decide(method, where)
    for group in plan.groups:
        gone = set(range(group.channels)) - set(group.kept)
        planted = set(dead.get(group.name, []))
        assert gone <= planted or planted <= gone, group.name  # nothing alive goes while something dead stays
        if planted and method == "taylor_oneshot":
            assert planted <= gone
    assert any(set(dead.get(group.name, [])) - set(group.kept) for group in plan.groups)
    by_size = decide("l1", where)
    assert all(set(dead[group.name]) <= set(group.kept) for group in by_size.groups if group.name in dead)


def test_taylor_is_the_squared_mean_gradient_of_minibatches():
    where = context("resnet8", "taylor_oneshot")
    rows = gate_gradients(where.network, Gates(where.groups), where.calibration, 128)
    scores = torch.stack([rows[:64].mean(0), rows[64:].mean(0)]).square().mean(0)
    plan, other = (_registry.method("taylor_oneshot").plan(where, _registry.options("taylor_oneshot", {
        "batch_size": size})) for size in (64, 2))
    ranking(where, [part.numpy() for part in scores.split(where.groups.sizes.tolist())], plan)
    assert other.kept != plan.kept


def test_hobs_methods_keep_what_their_scores_say():
    gates, _ = statistics_of("resnet8")
    scores = [part.numpy() for part in gates["hobs"].split(zoo_groups("resnet8").sizes.tolist())]
    for method in ("hobs_uniform", "hobs_rspar"):
        where = context("resnet8", method)
        plan = decide(method, where)
        ranking(where, scores, plan)
        assert plan.repair == "least_squares"


@pytest.mark.parametrize(("method", "updates"), [("hobs_rspar", 0), ("hobs_rspar_ppo", 1)])
def test_a_plan_records_its_search(method, updates):
    where = context("resnet8", method)
    plan = decide(method, where)
    assert plan.search.keys() == {"evaluations", "images", "chosen", "episodes", "measured"}
    assert len(plan.search["episodes"]) == updates and 1 <= plan.search["evaluations"] <= 5
    assert len(plan.search["measured"]) == plan.search["evaluations"]
    assert plan.search["images"] > 1000 * plan.search["evaluations"]
    json.dumps(plan.search)
    other = decide(method, context("resnet8", method, seed=43))
    assert other.search["measured"] != plan.search["measured"]
    assert (other.search["episodes"] != plan.search["episodes"]) == bool(updates)


def test_the_plan_is_the_network_that_was_evaluated(monkeypatch):
    """Channels of equal score, of which only some go: the plan and the environment must agree on which."""
    where = context("resnet8", "hobs_rspar")
    gates = dict(where.inputs.parts["gates"])
    gates["hobs"] = torch.zeros_like(gates["hobs"])
    where.inputs.parts["gates"] = gates
    plain, made = _rspar.PruningEnvironment, []
    monkeypatch.setattr(_rspar, "PruningEnvironment",
                        lambda *parts, **more: made.append(plain(*parts, **more)) or made[-1])
    plan = decide("hobs_rspar", where)
    assert plan.kept == made[0].kept([len(kept) for kept in plan.kept])


@pytest.mark.parametrize("method", available_methods())
def test_nothing_to_remove(method):
    plan = decide(method, context("resnet8", method, budget=1.0))
    assert all(len(group.kept) == group.channels for group in plan.groups)


@torch.no_grad()
def test_hrank_ranks_by_the_mean_rank_of_the_maps_that_are_read():
    """Against numpy, map by map; and a channel whose map is constant, or zero, goes before all others."""
    network, groups = copy.deepcopy(zoo("resnet8")), zoo_groups("resnet8")
    network.layer2[0].bn1.weight[[1, 6]], network.layer2[0].bn1.bias[[1, 6]] = 0, torch.tensor([-1.0, 1.0])
    group, data, seen = groups.named("layer2.0.conv1"), images(6, 1, 28, 10), []
    found = _registry.method("hrank").mean_ranks(network, groups, data)
    hook = network.layer2[0].conv2.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].numpy()))
    network(data.normalised(data.pixels))
    hook.remove()
    wanted = np.linalg.matrix_rank(seen[0]).mean(0)
    score = found[[part.name for part in groups].index(group.name)]
    assert score.tolist() == pytest.approx(wanted.tolist(), abs=0.34)  # ranks depend on rounding, now and then
    assert set(score.argsort()[:2].tolist()) == {1, 6} and score[1] == 0 and score[6] == 1
    stream = groups.named("conv1")  # read by two layers, the shortcut's convolution among them
    hrank, member = _registry.method("hrank"), stream.with_role("consumer")[0]
    assert hrank.maps(torch.ones(2, 16, 5, 3), member).shape == (2, 16, 5, 3)
    flat = Member("linear", "consumer", tuple(tuple(range(9 * i, 9 * i + 9)) for i in range(4)))
    x = torch.randn(2, 36)
    assert torch.equal(hrank.maps(x, flat)[1, 2], x[1, 18:27].view(3, 3))


def test_taylor_squares_the_gradient_of_a_minibatch_and_removes_while_it_trains():
    taylor, groups, data = _registry.method("taylor"), zoo_groups("resnet8"), images(64, 1, 28, 10)
    network, gates = copy.deepcopy(zoo("resnet8")), Gates(groups)
    batch = (data.normalised(data.pixels), data.labels)
    found = taylor.minibatch(network, gates, torch.ones(gates.total), batch)
    value = torch.ones(1, gates.total, requires_grad=True)
    plain = copy.deepcopy(zoo("resnet8")).train()
    with gates.applied(plain, value):
        torch.nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
    wanted = value.grad[0].square()
    assert np.corrcoef(found, wanted)[0, 1] > 0.95  # bfloat16
    where, mask, scores = context("resnet8", "taylor", budget=0.4), torch.ones(gates.total), torch.rand(gates.total)
    spent = []
    for share in (0.3, 0.6, 1.0):
        before = mask.clone()
        taylor.close(mask, taylor.ranked(gates, mask, scores), gates, where.space, share)
        assert (mask <= before).all()  # what is gone stays gone
        widths = np.array([int(part.sum()) for part in gates.split(mask)])
        spent.append(float(where.space.spent(widths)))
    assert spent == pytest.approx([0.82, 0.64, 0.4], abs=0.05)


def test_autocompress_anneals_towards_the_groups_that_matter(monkeypatch):
    autocompress, space = _registry.method("autocompress"), context("resnet8", "autocompress", budget=0.4).space
    monkeypatch.setattr(autocompress, "COOLING", 0.99)
    stub = TwoGroups(space)
    found = autocompress.annealed(space, stub, np.random.default_rng(0))
    assert space.meets(found[None])[0]
    assert stub.evaluate(found).accuracy > stub.evaluate(space.uniform).accuracy + 0.15


def test_admm_ends_at_the_nearest_weights_of_the_widths():
    """Without a loss, ADMM's fixed point is the projection: by brute force over all sets of filters of that size."""
    autocompress, groups = _registry.method("autocompress"), zoo_groups("resnet8")
    network = copy.deepcopy(zoo("resnet8"))
    place = [group.name for group in groups].index("layer2.0.conv1")
    widths = groups.sizes.copy()
    widths[place] = 4
    layer, before = network.layer2[0].conv1, network.layer2[0].conv1.weight.detach().clone()
    others = {name: weight.clone() for name, weight in network.state_dict().items() if name != "layer2.0.conv1.weight"}
    admm = autocompress.Admm(network, groups, widths, 1.0)
    for _ in range(8):
        admm.update()
        for _ in range(20):
            for weight in network.parameters():
                weight.grad = torch.zeros_like(weight)
            admm.pull()
            with torch.no_grad():
                for weight in network.parameters():
                    weight -= 0.2 * weight.grad
    energy = before.square().flatten(1).sum(1)
    kept = torch.tensor(max(itertools.combinations(range(len(energy)), 4), key=lambda some: energy[list(some)].sum()))
    wanted = torch.zeros_like(before).index_copy(0, kept, before[kept])
    assert torch.allclose(layer.weight, wanted, atol=1e-3)
    for name, weight in others.items():
        assert torch.allclose(network.state_dict()[name], weight, atol=1e-3)
    autocompress.remove(network, groups, widths)
    assert (layer.weight.flatten(1).abs().sum(1) > 0).nonzero()[:, 0].tolist() == kept.tolist()


def test_decore_drops_what_is_never_missed():
    """One group of two channels: the second decides about every image, the first about none."""
    policy_loss = _registry.method("decore").policy_loss
    logits, random = torch.zeros(2, requires_grad=True), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        kept = torch.bernoulli(torch.sigmoid(logits.detach()).expand(64, -1), generator=random)
        adam.zero_grad()
        policy_loss(logits, kept, kept[:, 1] > 0, [2], 2.0).backward()
        adam.step()
    assert logits[0] < -1 < 1 < logits[1]
    kept, right = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([True, False])
    start = torch.zeros(2, requires_grad=True)
    policy_loss(start, kept, right, [2], 3.0).backward()  # rewards 1 and -6, less their mean: 3.5 and -3.5
    assert start.grad.tolist() == pytest.approx([-3.5 / 2 * (0.5 - -0.5) / 2, -3.5 / 2 * (-0.5 - -0.5) / 2])


def amc_layers(budget: float):
    where = context("resnet8", "amc", budget=budget)
    return _registry.method("amc").Layers(where), where.space


def test_amc_walls_its_actions_so_that_the_budget_stays_within_reach():
    """The widest that the wall allows is the widest by brute force, and every episode meets the budget."""
    amc, random = _registry.method("amc"), np.random.default_rng(0)
    layers, space = amc_layers(0.3)
    for _ in range(20):
        widths = np.where(np.arange(len(space.sizes)) < 3, random.integers(space.low, space.sizes + 1), space.sizes)
        rest = [np.concatenate([widths[:3], [width], space.low[4:]]) for width in range(1, space.sizes[3] + 1)]
        fitting = [int(row[3]) for row in rest if space.groups.macs(row) <= space.target and row[3] >= space.low[3]]
        assert layers.walled(3, widths, 1.0) == max(fitting, default=int(space.low[3]))
        assert layers.walled(3, widths, 0.0) == space.low[3]
    agent = amc.Agent(0)
    for noise in (None, 0.5):
        widths, states, actions = amc.walk(layers, agent, noise, random)
        assert space.meets(widths[None])[0] and states.shape == (len(space.sizes), 11) and len(actions) == len(states)
        assert 0 <= states.min() and states.max() <= 1 and 0 < actions.min() and actions.max() <= 1


def test_amc_finds_the_groups_that_matter():
    """Accuracy depends on two groups alone; the agent ends near the best that any allocation reaches there."""
    amc = _registry.method("amc")
    layers, space = amc_layers(0.4)

    stub = TwoGroups(space)
    found = amc.search(layers, stub, amc.Options(episodes=150, random=30), 0)
    assert space.meets(found[None])[0]
    assert stub.evaluate(found).accuracy > max(0.9, stub.evaluate(space.uniform).accuracy + 0.15)


class TwoGroups:
    """Accuracy is the mean kept ratio of two groups: no other matters."""

    def __init__(self, space):
        self.space = space

    def evaluate(self, widths):
        return SimpleNamespace(accuracy=float((widths / self.space.sizes)[[1, 4]].mean()))


def test_gnn_finds_the_groups_that_matter():
    gnn, space = _registry.method("gnn"), context("resnet8", "gnn", budget=0.4).space
    stub = TwoGroups(space)
    found = gnn.search(space, stub, np.full(len(space.sizes), 0.3), gnn.Options(updates=30, episodes=16), 0)
    assert space.meets(found[None])[0]
    assert stub.evaluate(found).accuracy > max(0.85, stub.evaluate(space.uniform).accuracy + 0.1)


def test_gnn_joins_groups_that_share_a_layer():
    groups = zoo_groups("resnet8")
    edges, names = _registry.method("gnn").adjacency(groups), [group.name for group in groups]
    inner, stream, other = (names.index(name) for name in ("layer1.0.conv1", "conv1", "layer3.0.conv1"))
    assert edges[inner, stream] > 0 and edges[stream, inner] > 0 and edges[inner, other] == 0
    assert torch.allclose(edges.sum(1), torch.ones(len(groups)))


def test_scratch_trains_our_architecture_from_random_weights():
    """The widths of hobs_rspar, as many MACs as so many dense images, and no trace of the dense network's weights."""
    where, scratch = context("resnet8", "scratch", budget=0.5), _registry.method("scratch")
    where.inputs.splits["train"] = images(640, 1, 28, 10)
    plan = scratch.plan(where, scratch.Options(images=1280, batch_size=32, search=QUICK))
    ours = decide("hobs_rspar", context("resnet8", "hobs_rspar", budget=0.5))
    assert plan.kept == ours.kept and plan.repair == "none"
    assert plan.extra_training_images * plan.macs_ratio == pytest.approx(1280, abs=32)
    dense = copy.deepcopy(where.network)
    dense.load_state_dict(plan.weights)
    network, held_out = slicing.remove(dense, where.groups, plan), images(256, 1, 28, 10, seed=3)
    assert training.accuracy(training.logits(network, held_out), held_out.labels) > 60  # chance: 10
    for (name, tensor), old in zip(network.named_parameters(), rebuilt(where.network, where.groups,
                                                                       plan.kept).parameters()):
        if tensor.dim() > 1:
            together = torch.stack([tensor.detach().flatten(), old.detach().flatten()])
            assert abs(together.corrcoef()[0, 1]) < 0.3, name


# --- inputs and options

def test_inputs_from_files_are_those_of_the_stages(tmp_path):
    from hobs_rspar.checkpoint import save_tensors

    data = images(5)
    save_tensors(tmp_path / "dense" / "gates.safetensors", {"hobs": torch.arange(3.0)})
    save_tensors(tmp_path / "data" / "validation.safetensors",
                 {"pixels": data.pixels, "labels": data.labels, "mean": data.mean, "std": data.std})
    inputs = FileInputs(tmp_path / "dense", tmp_path / "data", torch.device("cpu"))
    assert inputs.tensors("gates")["hobs"].tolist() == [0, 1, 2]
    assert torch.equal(inputs.images("validation").pixels, data.pixels)
    with pytest.raises(UserError, match="factors.safetensors not found"):
        inputs.tensors("factors")


def test_options_are_checked():
    with pytest.raises(UserError, match="methods.hobs_rspar.itertions: .*Did you mean 'iterations'"):
        _registry.options("hobs_rspar", {"itertions": 3})
    with pytest.raises(UserError, match=r"methods.hobs_rspar.clip: .*less than 1.* \(seen: 1.5\)"):
        _registry.options("hobs_rspar", {"clip": 1.5})
    with pytest.raises(UserError, match=r"methods.hobs_rspar.images: .*1000.* \(seen: 500\)"):
        _registry.options("hobs_rspar", {"images": 500})
    with pytest.raises(UserError, match="methods.l1.power: .*Options: none"):
        _registry.options("l1", {"power": 2})
    with pytest.raises(UserError, match="method 'hobs_rspr' is not known. Did you mean 'hobs_rspar'"):
        _registry.method("hobs_rspr")
    with pytest.raises(UserError, match="method '_protocol' is not known"):
        _registry.method("_protocol")


def test_no_method_insists_on_a_precision():
    """bf16 without hardware for it is several times slower than fp32; params and the machine decide (device.py)."""
    for path in (Path(__file__).resolve().parents[1] / "src/hobs_rspar/methods").glob("*.py"):
        assert not re.search(r"[\"'](?:bf16|fp32)[\"']|torch\.bfloat16", path.read_text()), path.name

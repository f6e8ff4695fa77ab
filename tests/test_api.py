"""The public API: names, signatures and defaults as published, and the one call."""

import copy
import functools
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hobs_rspar
from hobs_rspar import cost, progress
from hobs_rspar.compression import OnDemand
from hobs_rspar.config import available_methods
from hobs_rspar.curvature import statistics
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import metrics
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import Phases
from small import (
    IMAGES,
    ZOO,
    Joined,
    Mixed,
    Plain,
    Stream,
    assert_same,
    images,
    seeded,
    snapshot,
    trained,
    zoo,
)

SRC = Path(hobs_rspar.__file__).parents[1]
REQUIRED = inspect.Parameter.empty
QUICK = {"first": 4, "rounds": 1, "measured": 1, "iterations": 1, "episodes": 2}  # a search that only works
# Names, parameters and defaults of the published API document; methods under "Class.method".
PUBLISHED = {
    "HOBSSensitivityAnalyzer": {"model": REQUIRED, "damping": 1e-3, "use_kfac": True},
    "HOBSSensitivityAnalyzer.compute_sensitivity": {"dataloader": REQUIRED, "criterion": None, "num_batches": 10},
    "HOBSSensitivityAnalyzer.get_pruning_plan": {"pruning_ratio": 0.5},
    "RSPARAgent": {"num_layers": REQUIRED, "layer_feature_dim": 3, "hidden_dim": 256, "lr": 3e-4, "gamma": 0.99},
    "RSPARAgent.select_action": {"state": REQUIRED, "deterministic": False},
    "RSPARAgent.update_policy": {"batch_size": 64, "epochs": 10},
    "KFACHessianApproximator": {"model": REQUIRED, "damping": 1e-3, "update_freq": 10},
    "KFACHessianApproximator.register_hooks": {},
    "KFACHessianApproximator.update_factors": {},
    "KFACHessianApproximator.compute_fisher_diagonal": {"layer_name": REQUIRED},
    "PhysicalPruner": {"model": REQUIRED, "example_input": None},
    "PhysicalPruner.prune": {"pruning_plan": REQUIRED},
    "SystemMetrics.measure_latency": {"model": REQUIRED, "input_shape": (1, 3, 224, 224), "num_iterations": 100},
    "SystemMetrics.measure_throughput": {"model": REQUIRED, "batch_size": 64, "input_shape": (3, 224, 224),
                                         "num_iterations": 50},
    "SystemMetrics.count_parameters": {"model": REQUIRED},
    "SystemMetrics.count_flops": {"model": REQUIRED, "input_shape": (1, 3, 224, 224)},
    "SystemMetrics.measure_all": {"model": REQUIRED, "batch_size": 64, "input_shape": (3, 224, 224)},
    "paired_t_test": {"baseline": REQUIRED, "method": REQUIRED, "alpha": 0.05},
    "bootstrap_confidence_interval": {"data": REQUIRED, "confidence": 0.95, "n_bootstrap": 10000},
    "run_statistical_analysis": {"results": REQUIRED, "baseline_name": "Unpruned"},
    "GPUProfiler": {"enabled": True},
    "GPUProfiler.start": {"name": REQUIRED},
    "GPUProfiler.end": {"name": REQUIRED},
    "GPUProfiler.get_summary": {},
    "GPUProfiler.print_summary": {},
    "plot_training_curves": {"history": REQUIRED, "save_path": None},
    "plot_pruning_comparison": {"methods": REQUIRED, "accuracies": REQUIRED, "speedups": REQUIRED, "save_path": None},
    "plot_sensitivity_heatmap": {"sensitivity_scores": REQUIRED, "layer_names": REQUIRED, "save_path": None},
    "plot_lambda_evolution": {"lambda_history": REQUIRED, "acc_history": REQUIRED, "save_path": None},
    **{f"{name}_prune": {"model": REQUIRED, "dataloader": REQUIRED, "pruning_ratio": 0.5}
       for name in ("dep_graph", "taylor", "random", "random_repair", "l1", "l1_repair", "l2_global", "fpgm", "lamp",
                    "udfc", "udfc_seed", "depgraph", "jtp", "jtp_seed", "bilevel", "bilevel_seed", "structalign",
                    "structalign_seed", "scratch", "taylor_iterative", "hrank", "decore", "autocompress", "amc", "gnn",
                    "adaprune", "hobs_uniform", "hobs_rspar")},
    "compress": {"model": REQUIRED, "loader": REQUIRED, "macs": 0.5},
}


def resolved(path: str):
    thing = hobs_rspar
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing


@pytest.mark.parametrize("path", PUBLISHED)
def test_signatures_as_published(path):
    parameters = dict(inspect.signature(resolved(path)).parameters)
    parameters.pop("self", None)
    wanted = PUBLISHED[path]
    assert list(parameters)[:len(wanted)] == list(wanted)
    assert {name: parameters[name].default for name in wanted} == wanted
    for name in wanted:
        assert parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for extra in list(parameters.values())[len(wanted):]:  # more than published must not be needed
        assert extra.default is not REQUIRED or extra.kind is inspect.Parameter.VAR_KEYWORD


def test_every_public_name_can_be_imported():
    for name in hobs_rspar.__all__:
        assert getattr(hobs_rspar, name).__doc__, name
    assert {path.split(".")[0] for path in PUBLISHED} | {"groups", "PruningPlan", "UserError", "unpruned"} == \
        set(hobs_rspar.__all__)
    assert dir(hobs_rspar) == hobs_rspar.__all__
    for name in available_methods():  # each method has its function; some have the published name
        published = {"unpruned": "unpruned", "depgraph_seed": "dep_graph_prune", "taylor_oneshot": "taylor_prune",
                     "taylor": "taylor_iterative_prune"}
        if not name.startswith("hobs_rspar_"):  # ablations are for studies only
            assert hasattr(hobs_rspar, published.get(name, f"{name}_prune"))
    with pytest.raises(AttributeError, match="module 'hobs_rspar' has no attribute 'comprss'"):
        hobs_rspar.comprss  # noqa: B018


def test_names_load_on_first_use():
    code = ("import sys, hobs_rspar; assert 'torch' not in sys.modules; hobs_rspar.UserError, hobs_rspar.PruningPlan; "
            "import hobs_rspar.config, hobs_rspar.paths; assert 'torch' not in sys.modules; hobs_rspar.RSPARAgent; "
            "assert 'torch' in sys.modules and 'torch_pruning' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SRC)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def loader_of(data, size: int = 64) -> DataLoader:
    return DataLoader(TensorDataset(data.normalised(data.pixels).contiguous(), data.labels), size)


@pytest.fixture(scope="module")
def stream():
    """A trained network and a loader for it."""
    network = trained(seeded(Stream), images(512), epochs=3)
    return network, loader_of(images(640, seed=1))


# --- compress

def test_compress(stream):
    network, loader = stream
    before = snapshot(network)
    smaller, plan, report = hobs_rspar.compress(network, loader, macs=0.4, **QUICK)
    assert_same(before, snapshot(network))
    counted = cost.count(smaller, IMAGES[:1])
    dense = cost.count(network, IMAGES[:1])
    assert report["macs"] == (dense.macs, counted.macs) and report["params"] == (dense.params, counted.params)
    assert report["macs_ratio"] == counted.macs / dense.macs == plan.macs_ratio
    assert abs(report["macs_ratio"] - 0.4) <= 0.004
    assert isinstance(plan, PruningPlan) and plan.method == "hobs_rspar" and plan.network == "Stream"
    assert report["images"] == {"calibration": 320, "validation": 320}
    assert report["search"]["episodes"] == [] and 2 <= len(report["search"]["measured"]) <= 5
    top1 = report["top1_validation"]
    assert top1.keys() == {"dense", "pruned", "repaired"} and top1["dense"] > 90
    assert top1["repaired"] > 85 and top1["repaired"] > top1["pruned"]
    assert not smaller.training and all(p.requires_grad for p in smaller.parameters())
    assert smaller.stem.out_channels == len(plan.groups[0].kept)
    x, labels = next(iter(loader))
    F.cross_entropy(smaller.train()(x), labels).backward()  # ready for a training loop of the user's


def test_compress_is_repeatable(stream):
    network, loader = stream
    (first, plan, _), (second, again, _), (_, other, _) = (
        hobs_rspar.compress(network, loader, macs=0.5, method="random", seed=seed) for seed in (3, 3, 4))
    assert plan == again and plan.kept != other.kept
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


# Methods whose defaults are meant for a study; trained ones see two epochs of the loader or less.
SHORT = {"scratch": {"images": 500, "search": QUICK}, "amc": {"episodes": 4, "random": 2},
         "gnn": {"updates": 2, "episodes": 3}} | dict.fromkeys(
    ("depgraph", "jtp", "jtp_seed", "bilevel", "bilevel_seed", "structalign", "structalign_seed", "taylor", "decore",
     "autocompress"), {"images": 1000})


@pytest.mark.parametrize("method", available_methods())
def test_compress_by_every_method(stream, method):
    network, loader = stream
    options = QUICK if method.startswith("hobs_rspar") else SHORT.get(method, {})
    budget = 1.0 if method == "unpruned" else 0.4
    smaller, plan, report = hobs_rspar.compress(network, loader, macs=budget, method=method, **options)
    assert plan.method == method and abs(report["macs_ratio"] - budget) <= 0.01 * budget
    assert smaller(IMAGES).shape == (5, 4)


def test_compress_protects(stream):
    network, loader = stream
    smaller, plan, _ = hobs_rspar.compress(network, loader, macs=0.85, protect=["stem"], method="l1")
    assert smaller.stem.out_channels == smaller.inner.out_channels == 24 and smaller.down.out_channels < 48
    assert plan.groups[0].reason == "kept whole: as asked"


@pytest.mark.parametrize("kind", [Mixed, Joined, Plain])
def test_compress_networks_with_other_shapes(kind):
    network = seeded(kind)
    try:
        smaller, _, report = hobs_rspar.compress(network, loader_of(images(128)), macs=0.65, method="hobs_uniform")
    except UserError as problem:  # so few channels that 1 % may be out of reach
        assert "cannot be met within 1.0%" in str(problem)
        return
    assert abs(report["macs_ratio"] - 0.65) <= 0.0065 and smaller(IMAGES).shape == (5, 4)


@pytest.mark.parametrize(("changes", "words"), [
    ({"macs": 0}, r"macs .* must be within \(0, 1\]; seen: 0"), ({"macs": 1.1}, "seen: 1.1"),
    ({"macs": 0.01}, "budget 0.01x MACs cannot be met: with every group at its floor"),
    ({"method": "l3"}, "method 'l3' is not known. Did you mean 'l1'"),
    ({"method": "l1", "power": 2}, "option l1.power: Extra inputs are not permitted. Options: none"),
    ({"macs": "half"}, r"must be within \(0, 1\]; seen: 'half'"), ({"macs": float("nan")}, "seen: nan"),
    ({"protect": ["stm"]}, "protect: 'stm' is not a layer of Stream. Did you mean 'stem'"),
    ({"sample": 1}, "sample is the number of images .* 2 or more; seen: 1"), ({"seed": "a"}, "seed must be a whole"),
    ({"method": None}, "method is the name of one, .* seen: None"),
    ({"loader": []}, "the dataloader is empty"),
    ({"loader": [(IMAGES[:1], torch.zeros(1))]}, "the loader has 1 images; at least"),
    ({"loader": [(torch.zeros(4, 3, 9, 9), torch.zeros(4))]}, r"input shape \(1, 3, 9, 9\) .* 'stem' takes 2 channels"),
    ({"loader": [(torch.zeros(4, 2, 9, 9), torch.arange(4) + 1)]}, "a label is 4, and the network has 4 outputs"),
    ({"model": nn.Sequential(seeded(Stream), nn.Softmax(1))}, "the output must be logits .*; it is probabilities"),
])
def test_compress_refuses(stream, changes, words):
    network, loader = stream
    before = snapshot(network)
    with pytest.raises(UserError, match=words):
        hobs_rspar.compress(**{"model": network, "loader": loader, "macs": 0.5} | changes)
    assert_same(before, snapshot(network))


@pytest.mark.parametrize(("method", "paid"), [
    ("l1", set()), ("fpgm", set()), ("l1_repair", set()), ("taylor_oneshot", {"gate_statistics"}),
    ("hobs_uniform", {"factors", "eliminations"}),
])
def test_a_method_pays_only_for_what_it_uses(stream, monkeypatch, method, paid):
    seen = set()

    def watched(name: str, real):
        return lambda *arguments: seen.add(name) or real(*arguments)

    for name in ("collect", "gate_statistics", "factors", "eliminations"):
        monkeypatch.setattr(statistics, name, watched(name, getattr(statistics, name)))
    report = hobs_rspar.compress(*stream, macs=0.5, method=method)[2]
    assert seen == paid
    assert ("sensitivity" in report["seconds"]) == bool(paid)


def test_statistics_are_computed_once_with_their_kin():
    calls = []

    def pair() -> dict:
        calls.append(1)
        return {"a": torch.ones(1), "b": torch.zeros(1)}

    found = OnDemand(dict.fromkeys(("a", "b"), functools.cache(pair)))
    assert set(found) == {"a", "b"} and len(found) == 2 and not calls
    assert found["a"] == 1 and found["b"] == 0 and len(calls) == 1
    with pytest.raises(KeyError):
        found["c"]


def test_compress_takes_a_bounded_sample_and_reports_what_it_took(stream):
    network, loader = stream
    report = hobs_rspar.compress(network, loader, macs=0.5, method="l1", sample=101, progress=False)[2]
    assert report["images"] == {"calibration": 50, "validation": 51} and report["left_alone"] == {}
    assert set(report["seconds"]) == set(report["peak_memory"]) == {"images", "trace", "search", "repair"}
    assert all(seconds > 0 for seconds in report["seconds"].values())
    peaks = [report["peak_memory"][phase] for phase in ("images", "trace", "search", "repair")]
    assert peaks == sorted(peaks) and peaks[0] > 2**24


def test_a_loader_of_few_classes_is_told(stream):
    network, data = stream[0], images(64)
    one = torch.zeros_like(data.labels)
    with pytest.warns(UserWarning, match="the 64 images that were taken from the loader show 1 of the network's 4 cl"):
        hobs_rspar.compress(network, [(data.normalised(data.pixels), one)], macs=0.5, method="l1")


def test_what_a_phase_takes_is_its_own(monkeypatch):
    now = iter([0, 10, 13, 20, 24, 99])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    phases = Phases("call", ["search", "sensitivity"])
    with phases.phase("search"), phases.phase("sensitivity"):  # from 0 to 20, from 10 to 13
        pass
    with phases.phase("search"):  # from 24 to 99
        pass
    assert phases.seconds == {"search": 10 + 7 + 75, "sensitivity": 3}


def test_bars_are_shown_only_where_they_are_wanted():
    with progress.showing(False):
        assert progress.bar(range(2), "x").disable
        with progress.showing(True):  # the outer call's wish holds
            assert progress.bar(range(2), "x").disable
        with progress.image_bar("x", 2) as advance:
            advance(1)
    assert list(progress.bar(range(2), "x")) == [0, 1]


def test_compress_restores_the_training_mode(stream):
    network = seeded(Stream).train()
    hobs_rspar.compress(network, stream[1], macs=0.5, method="l1")
    assert all(module.training for module in network.modules())


def test_compress_leaves_a_frozen_batch_norm_frozen(stream):
    network = seeded(Stream).train()
    network.stem_bn.eval()
    hobs_rspar.compress(network, stream[1], macs=0.5, method="l1")
    assert not network.stem_bn.training and network.down_bn.training


class Viewed(nn.Module):
    """``view`` instead of ``flatten``, as most tutorials have it: works with contiguous tensors only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 24, 3), nn.Conv2d(24, 24, 3)
        self.out = nn.Linear(24 * 25, 4)

    def forward(self, x):
        y = F.relu(self.second(F.relu(self.first(x))))
        return self.out(y.view(y.size(0), -1))


@pytest.mark.parametrize("method", ["l1", "hobs_rspar"])
def test_compress_networks_that_need_contiguous_tensors(method):
    network = seeded(Viewed)
    network(IMAGES)  # works
    options = QUICK if method == "hobs_rspar" else {}
    smaller, _, _ = hobs_rspar.compress(network, loader_of(images(128)), macs=0.5, method=method, **options)
    assert smaller(IMAGES).shape == (5, 4)


class Halved(nn.Module):
    """A convolution whose channels go two ways, which keeps it whole, and one that can be pruned."""

    def __init__(self):
        super().__init__()
        self.both, self.left, self.right = nn.Conv2d(2, 8, 3), nn.Conv2d(4, 48, 1), nn.Conv2d(4, 48, 1)
        self.out = nn.Linear(48, 4)

    def forward(self, x):
        left, right = self.both(x).chunk(2, 1)
        return self.out(F.relu(self.left(left) + self.right(right)).mean((2, 3)))


class Blocked(nn.Module):
    """A layer that is called twice and sizes written as numbers keep their groups whole; one group can be pruned."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.curve = nn.Conv2d(8, 4, 1)
        self.free, self.out = nn.Conv2d(4, 96, 3), nn.Linear(96, 4)

    def forward(self, x):
        y = F.relu(self.again(F.relu(self.again(F.relu(self.first(x))))))
        y = F.relu(self.curve(y)).reshape(-1, 4 * 49).reshape(-1, 4, 7, 7)
        return self.out(F.relu(self.free(y)).mean((2, 3)))


@pytest.mark.parametrize("method", ["l1", "depgraph_seed", "taylor_oneshot", "hobs_rspar"])
@pytest.mark.parametrize("kind", [Halved, Blocked])
def test_compress_networks_with_groups_that_stay_whole(kind, method):
    network = seeded(kind)
    options = QUICK if method == "hobs_rspar" else {}
    smaller, plan, _ = hobs_rspar.compress(network, loader_of(images(64)), macs=0.8, method=method, **options)
    kept = {group.name: len(group.kept) / group.channels for group in plan.groups}
    whole = {name for name, part in kept.items() if part == 1}
    assert set(kept) - whole == {"left" if kind is Halved else "free"}
    assert smaller(IMAGES).shape == (5, 4)


def test_compress_a_network_with_nothing_to_prune():
    network = nn.Sequential(nn.Flatten(), nn.Linear(162, 4))
    with pytest.raises(UserError, match="nothing to prune|no group"):
        hobs_rspar.compress(network, loader_of(images(64)), macs=0.5)


def test_compress_where_gradients_are_off():
    with torch.no_grad():
        smaller, _, _ = hobs_rspar.compress(seeded(Stream), loader_of(images(64)), macs=0.5, method="l1")
    assert smaller(IMAGES).shape == (5, 4)


class Twice(nn.Module):
    """A convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(2, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.last, self.out = nn.Conv2d(32, 48, 3), nn.Linear(48, 4)

    def forward(self, x):
        y = F.relu(self.again(F.relu(self.first(x))))
        return self.out(F.relu(self.last(F.relu(self.again(y)))).mean((2, 3)))


def test_compress_a_network_that_calls_a_layer_twice():
    try:
        smaller, _, _ = hobs_rspar.compress(seeded(Twice), loader_of(images(64)), macs=0.5, method="hobs_uniform")
    except UserError as problem:
        assert "again" in str(problem)
    else:
        assert smaller(IMAGES).shape == (5, 4)


# --- the published functions

@pytest.mark.parametrize("name", ["dep_graph_prune", "taylor_prune", "random_prune", "l1_prune", "l2_global_prune",
                                  "fpgm_prune", "lamp_prune", "udfc_seed_prune", "hobs_uniform_prune"])
def test_pruning_functions_remove_the_ratio(stream, name):
    network, loader = stream
    dense = cost.count(network, IMAGES[:1]).macs
    for ratio in (0.5, 0.3):
        smaller = getattr(hobs_rspar, name)(network, loader, pruning_ratio=ratio)
        assert isinstance(smaller, Stream) and smaller is not network
        assert abs(cost.count(smaller, IMAGES[:1]).macs / dense - (1 - ratio)) <= 0.01 * (1 - ratio)


def test_methods_that_train_do_so_on_the_loader(stream):
    """The user's model stays as it was; what comes out is no mere part of it."""
    network, loader = stream
    before, short = copy.deepcopy(network.state_dict()), {"images": 64, "batch_size": 32}
    for name in ("depgraph_prune", "jtp_prune", "bilevel_prune", "structalign_seed_prune"):
        more = {"rounds": 1, "episodes": 2, "updates": 2, "held_out": 64} if name == "jtp_prune" else {}
        smaller = getattr(hobs_rspar, name)(network, loader, 0.5, **short, **more)
        assert abs(cost.count(smaller, IMAGES[:1]).macs / cost.count(network, IMAGES[:1]).macs - 0.5) <= 0.005, name
        values = set(before["out.weight"].flatten().tolist())
        assert not set(smaller.out.weight.flatten().tolist()) <= values, name
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_pruning_functions_pass_their_options_on(stream):
    network, loader = stream
    smaller = hobs_rspar.hobs_rspar_prune(network, loader, 0.15, **QUICK, seed=3, protect=["stem"])
    assert smaller.stem.out_channels == 24 and smaller.down.out_channels < 48
    seeds = [hobs_rspar.random_prune(network, loader, 0.5, seed=seed).state_dict() for seed in (1, 2)]
    assert any(not torch.equal(a, b) for a, b in zip(*(state.values() for state in seeds)))
    assert hobs_rspar.unpruned(network) is network and hobs_rspar.unpruned(network, loader, 0.5, x=1) is network


@pytest.mark.parametrize("ratio", [1.5, 1, -0.1])
def test_a_wrong_ratio_is_named_as_the_caller_gave_it(stream, ratio):
    with pytest.raises(UserError, match=rf"pruning_ratio .* within \[0, 1\); seen: {ratio}"):
        hobs_rspar.l1_prune(*stream, pruning_ratio=ratio)


def test_published_returns(stream):
    """Types as the published document says them."""
    network, loader = stream
    analyzer = hobs_rspar.HOBSSensitivityAnalyzer(network)
    scores = analyzer.compute_sensitivity(loader, num_batches=2)
    assert isinstance(scores, dict) and set(scores) == {"stem", "inner", "down"}
    plan = analyzer.get_pruning_plan(pruning_ratio=0.5)
    assert isinstance(plan, dict) and all(isinstance(i, int) for filters in plan.values() for i in filters)
    assert isinstance(hobs_rspar.PhysicalPruner(network, IMAGES[:1]).prune(plan), Stream)
    kfac = hobs_rspar.KFACHessianApproximator(network, update_freq=1)
    kfac.register_hooks()
    F.cross_entropy(network(IMAGES), torch.zeros(5, dtype=torch.long)).backward()
    kfac.update_factors()
    kfac.remove_hooks()
    network.zero_grad()
    assert kfac.compute_fisher_diagonal("down").shape == network.down.weight.shape
    action = hobs_rspar.RSPARAgent(2).select_action(torch.zeros(1, 6))
    assert isinstance(action, tuple) and len(action) == 2
    assert hobs_rspar.SystemMetrics.count_parameters(network) == cost.count(network, IMAGES[:1]).params
    assert hobs_rspar.SystemMetrics.count_flops(network, (1, 2, 9, 9)) == cost.count(network, IMAGES[:1]).macs


# --- measurement

class Tray(nn.Module):
    """Works in the default layout only, and remembers the layouts it was called in."""

    def __init__(self):
        super().__init__()
        self.bake, self.serve, self.strict = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8 * 256, 10), True
        self.layouts = []

    def forward(self, x):
        y = F.relu(self.bake(x))
        self.layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        return self.serve(y.view(y.size(0), -1) if self.strict else y.flatten(1))


def test_metrics_of_a_network_that_needs_contiguous_tensors():
    network = Tray()
    assert hobs_rspar.SystemMetrics.count_flops(network, (1, 3, 32, 32)) == 75776  # 8 x 27 x 256 + 20,480
    assert hobs_rspar.SystemMetrics.measure_latency(network, (1, 3, 32, 32), 2)[0] > 0
    assert hobs_rspar.SystemMetrics.measure_throughput(network, 2, (3, 32, 32), 2) > 0


@pytest.mark.parametrize("strict", [True, False])
def test_metrics_measure_in_channels_last_where_the_network_runs_in_it(strict):
    network = Tray()
    network.strict = strict
    ready, x = metrics._fitted(network, (2, 3, 32, 32))
    ready.layouts.clear()
    ready(x)
    assert ready.layouts == [not strict] and network.bake.weight.is_contiguous()


def test_parameters_are_counted_of_networks_with_shapes_only():
    assert hobs_rspar.SystemMetrics.count_parameters(nn.Linear(3, 4, device="meta")) == 16
    with pytest.raises(UserError, match="'weight' has no shape yet"):
        hobs_rspar.SystemMetrics.count_parameters(nn.LazyLinear(3))
    with pytest.raises(UserError, match="Tray is a class: give an instance"):
        hobs_rspar.SystemMetrics.count_parameters(Tray)


def test_metrics_of_a_network_in_half_precision():
    assert hobs_rspar.SystemMetrics.count_flops(Tray().bfloat16(), (1, 3, 32, 32)) == 75776
    assert hobs_rspar.SystemMetrics.measure_latency(Tray().bfloat16(), (1, 3, 32, 32), 1)[0] > 0


@pytest.mark.parametrize(("network", "shape", "words"), [
    (Tray(), (1, 1, 32, 32), "does not fit Tray: 'bake' takes 3 channels"), (Tray(), 32, "input shape 32: every entry"),
    (Tray(), (), "every entry must be a positive"), (Tray, (1, 3, 32, 32), "Tray is a class: give an instance"),
    (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Unflatten(1, (3, 2))), (1, 3, 8, 8), "does not run in '1', on an input"),
])
def test_metrics_say_the_real_cause(network, shape, words):
    for measure in (hobs_rspar.SystemMetrics.count_flops, hobs_rspar.SystemMetrics.measure_latency):
        with pytest.raises(UserError, match=words):
            measure(network, shape)


# --- groups

def test_groups_print_what_is_coupled():
    text = str(hobs_rspar.groups(zoo("resnet8"), ZOO["resnet8"].example(), protect=["conv1"]))
    lines = text.splitlines()
    macs = cost.count(zoo("resnet8"), ZOO["resnet8"].example()).macs
    assert lines[0] == f"6 groups, 224 channels, {macs / 1e6:.1f} M MACs"
    assert lines[1] == "  conv1: 16 channels (kept whole: as asked)"
    assert lines[2].split(": ")[0].strip() == "producers"
    assert set(lines[2].split(": ")[1].split(", ")) == {"conv1", "layer1.0.conv2"}
    assert sum(line.startswith("  ") and not line.startswith("   ") for line in lines) == 6
    assert "depthwise: depthwise" in str(hobs_rspar.groups(seeded(Mixed), IMAGES[:1]))

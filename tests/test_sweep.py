"""The sweep, its watchers and what is made of them, against brute force, dense Fisher and plain autograd."""

import copy

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from hobs_rspar import surgery
from hobs_rspar.curvature import gates as gates_module
from hobs_rspar.curvature.filters import FilterMoments, filter_scores, kron_obd
from hobs_rspar.curvature.gates import Gates, fisher_score, gate_gradients, relabelled, signed_score, taylor_score
from hobs_rspar.curvature.hobs import kfac_hessian, kfac_score
from hobs_rspar.curvature.joint import JointModel
from hobs_rspar.curvature.kfac import KFACHessianApproximator
from hobs_rspar.curvature.oracle import loss_changes
from hobs_rspar.curvature.passes import products, sweep
from hobs_rspar.folding import folded, following_norms, slope
from small import IMAGES, Joined, Mixed, Plain, Stream, assert_same, images, seeded, snapshot, trained
from test_curvature import LAYERS, refit, seed, two_consumers


class OneLayer(nn.Module):
    """One layer, a batch norm perhaps, and a classifier of random weights, on 9x9 images of as many channels."""

    def __init__(self, layer: nn.Module, outputs: int, norm: bool = False):
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm2d(outputs) if norm else nn.Identity()
        self.out = nn.LazyLinear(4)

    def forward(self, x):
        x = x.mean((2, 3)) if isinstance(self.layer, nn.Linear) else x
        return self.out(F.relu(self.norm(self.layer(x))).flatten(1))


class TwiceRead(nn.Module):
    """A convolution whose output a batch norm reads, and something else, too."""

    def __init__(self):
        super().__init__()
        self.first, self.bn, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return self.out(F.relu(self.second(F.relu(self.bn(y) + y))).mean((2, 3)))


# --- folding

@pytest.mark.parametrize("kind", [Mixed, Joined, Plain, Stream, TwiceRead])
def test_folding_is_the_same_function(kind):
    network = seeded(kind)
    before, wanted = snapshot(network), network(IMAGES)
    with folded(network, IMAGES[:1]):
        assert torch.allclose(network(IMAGES), wanted, atol=1e-5)
    assert_same(before, snapshot(network))
    assert torch.equal(network(IMAGES), wanted)


def test_only_norms_that_alone_read_a_convolution_are_folded():
    assert set(following_norms(seeded(Mixed), IMAGES[:1])) == {"stem", "expand", "depthwise", "project"}
    assert not following_norms(seeded(Joined), IMAGES[:1])  # normalised after the branches have been joined
    assert not following_norms(seeded(TwiceRead), IMAGES[:1])
    assert not following_norms(seeded(Mixed).train(), IMAGES[:1])


def test_slope_without_affine_parameters():
    norm = nn.BatchNorm2d(3, affine=False)
    norm.running_var.copy_(torch.tensor([0.5, 1.0, 4.0]))
    assert torch.allclose(slope(norm), (norm.running_var + norm.eps).rsqrt())


# --- the sweep

@pytest.mark.parametrize("shape", [(5, 3), (7, 3, 4, 5), (300, 16, 9, 9)])
def test_products_are_summed_over_positions(shape):
    x, y = torch.randn(shape, generator=seed()), torch.randn(shape, generator=seed(1))
    wanted = (x * y).flatten(2).sum(2) if len(shape) == 4 else x * y
    assert torch.allclose(products(x, y, 1 - len(shape)), wanted, atol=1e-4)
    x, y = x.movedim(1, -1), y.movedim(1, -1)
    assert torch.allclose(products(x, y, -1), wanted, atol=1e-4)


def test_both_kinds_of_labels_cost_only_the_images_that_differ(monkeypatch):
    network, data = seeded(Mixed), images(40)
    gates = Gates(surgery.groups(network, IMAGES[:1]))
    seen = gates_module.GateGradients(network, gates, 40)
    labels = sweep(network, data, 16, [seen], seed(2))
    passed = []
    monkeypatch.setattr(gates_module, "gate_gradients",
                        lambda *a: passed.append(len(a[2])) or gate_gradients(*a))
    found = relabelled(network, gates, data, 16, seen.rows, labels)
    assert passed == [int((labels != data.labels).sum())] and 0 < passed[0] < 40
    assert torch.allclose(found, gate_gradients(network, gates, data, 16), atol=1e-6)
    assert torch.equal(relabelled(network, gates, data, 16, found, data.labels), found) and len(passed) == 1


def test_a_sweep_leaves_no_gradients_and_no_graph():
    network, data = seeded(Mixed), images(8)
    before = snapshot(network)
    assert torch.equal(sweep(network, data, 4, []), data.labels)
    assert_same(before, snapshot(network))
    assert torch.is_grad_enabled()
    with torch.no_grad():
        sweep(network, data, 4, [])
        assert not torch.is_grad_enabled()


def test_large_rows_are_kept_in_half_the_memory(monkeypatch):
    network, data = seeded(Mixed), images(32)
    gates = Gates(surgery.groups(network, IMAGES[:1]))
    exact = gate_gradients(network, gates, data, 32)
    monkeypatch.setattr(gates_module, "ROWS_BYTES", 4 * 32 * gates.total - 1)
    half = gate_gradients(network, gates, data, 32)
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.allclose(fisher_score(half), fisher_score(exact), rtol=0.02)
    assert torch.allclose(taylor_score(half, 8), taylor_score(exact, 8), rtol=0.1, atol=1e-7)
    assert 4 * 2048 * 26_560 <= 2**30  # ResNet-50 on 2,048 images stays exact, within 4 GiB for everything


# --- filters

@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", list(LAYERS))
def test_filter_moments_are_those_of_plain_autograd(name, norm):
    layer, channels = LAYERS[name]
    if norm and name == "linear":
        pytest.skip("a batch norm of images")
    data = images(12, channels)
    x = data.normalised(data.pixels)
    torch.manual_seed(0)
    network = OneLayer(copy.deepcopy(layer), len(layer.weight), norm)
    network(x)  # gives the lazy layer its shape, and the batch norm statistics of these images
    if norm:
        network.norm.momentum = None
        network.norm.reset_running_stats()
        network(x)
    network.eval()
    moments = FilterMoments(network, [])
    moments.layers = {"layer": network.layer}  # whatever its role in a group
    sweep(network, data, 5, [moments])
    outputs = []
    handle = network.layer.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    loss = F.cross_entropy(network(x), data.labels, reduction="sum")
    handle.remove()
    z, g = outputs[0].detach(), torch.autograd.grad(loss, outputs[0])[0]
    z, g = (part.flatten(2) if part.dim() == 4 else part[:, :, None] for part in (z, g))
    assert torch.allclose(moments.fisher("layer"), g.square().mean(2).mean(0), rtol=1e-3, atol=1e-9)
    assert torch.allclose(moments.energy("layer"), z.square().sum(2).mean(0), rtol=0.02 if norm else 1e-4)


def test_filter_scores_are_their_formulas():
    """Of a filter in a chain: brute force over the weights for OBD, the trace for Kronecker OBD, a solve for OBS."""
    network, data = seeded(Plain), images(64)
    groups = surgery.groups(network, IMAGES[:1])
    moments, kfac = FilterMoments(network, groups), KFACHessianApproximator(network, 1e-3, 1)
    sweep(network, data, 64, [moments, kfac], seed())
    factors = kfac.stored()
    found = filter_scores(groups, moments, factors, 1e-6)
    column = 0
    for name in ("first", "second"):
        layer = network.get_submodule(name)
        a, g = factors[f"{name}/a"][0].double(), factors[f"{name}/g"][0].double()
        filters = torch.cat([layer.weight.detach().flatten(1), layer.bias.detach()[:, None]], 1).double()
        whole = ((filters @ a) * filters).sum(1)
        level = 1e-6 * g.diagonal().mean()
        wanted = {"obd": 0.5 * g.diagonal() * (filters**2 * a.diagonal()).sum(1),
                  "kron_obd": 0.5 * g.diagonal() * whole,
                  "kron_obs": 0.5 * whole / torch.linalg.inv(g + level * torch.eye(len(g))).diagonal()}
        for score, values in wanted.items():
            part = found[score][column:column + len(values)].double()
            assert torch.allclose(part, values, rtol=2e-3), (name, score)
        assert (wanted["kron_obs"] <= wanted["kron_obd"] * (1 + 1e-5)).all()  # compensation cannot cost more
        column += len(filters)
    assert torch.equal(found["kron_obd"], kron_obd(groups, moments))


def test_filters_of_a_stream_cost_the_sum_over_its_producers():
    network, data = seeded(Mixed), images(32)
    groups = surgery.groups(network, IMAGES[:1])
    moments = FilterMoments(network, groups)
    sweep(network, data, 16, [moments], seed())
    parts = dict(zip([group.name for group in groups], kron_obd(groups, moments).split(groups.sizes.tolist())))
    for group, layers in (("stem", ("stem", "project")), ("expand", ("expand", "depthwise")), ("hidden", ("hidden",))):
        wanted = sum(0.5 * moments.fisher(name) * moments.energy(name) for name in layers)
        assert torch.allclose(parts[group], wanted)


# --- joint model and brute force

def noisy_stream():
    train, data = images(1024, wrong=0.4), images(256, seed=3, wrong=0.4)
    torch.manual_seed(0)
    return trained(Stream(), train, epochs=2, learning_rate=0.02), data


@pytest.mark.parametrize("kind", [Mixed, Joined, Plain])
def test_brute_force_is_closing_gates(kind):
    network, data = seeded(kind), images(20)
    groups = surgery.groups(network, IMAGES[:1])
    gates, before = Gates(groups), snapshot(network)
    found = loss_changes(network, groups, data, 8)
    assert_same(before, snapshot(network))
    x = data.normalised(data.pixels)
    with torch.no_grad():
        dense = F.cross_entropy(network(x), data.labels).item()
        for column in range(gates.total):
            gate = torch.ones(1, gates.total).index_fill(1, torch.tensor([column]), 0)
            with gates.applied(network, gate):
                assert float(found[column]) == pytest.approx(
                    F.cross_entropy(network(x), data.labels).item() - dense, abs=2e-5)


def test_signed_scores_and_joint_model_predict_true_losses():
    network, data = noisy_stream()
    groups = surgery.groups(network, IMAGES[:1])
    gates = Gates(groups)
    rows = gate_gradients(network, gates, data, 256)
    assert spearmanr(signed_score(rows, rows), loss_changes(network, groups, data, 256)).statistic >= 0.95
    model, random = JointModel.of_gates(rows, rows), seed(1)
    removed = (torch.rand(40, gates.total, generator=random) < 0.3 * torch.rand(40, 1, generator=random)).float()
    x, truth = data.normalised(data.pixels), []
    with torch.no_grad():
        for mask in removed:
            with gates.applied(network, 1 - mask[None]):
                truth.append(F.cross_entropy(network(x), data.labels).item())
    assert spearmanr(model.loss(removed), truth).statistic >= 0.85
    assert torch.allclose(model.loss(torch.eye(gates.total)).float(), signed_score(rows, rows), rtol=1e-3, atol=1e-7)


def test_joint_elimination_is_greedy():
    root = torch.randn(12, 9, generator=seed(), dtype=torch.float64)
    model = JointModel(0.3 * torch.randn(9, generator=seed(1), dtype=torch.float64), root.T @ root / 12)
    order, costs = model.eliminate()
    gone = torch.zeros(9, dtype=torch.float64)
    for channel, cost in zip(order.tolist(), costs.tolist()):
        before = model.loss(gone)
        trials = {c: float(model.loss(gone.index_fill(0, torch.tensor([c]), 1)) - before)
                  for c in range(9) if not gone[c]}
        assert channel == min(trials, key=trials.get) and cost == pytest.approx(trials[channel])
        gone[channel] = 1
    some, _ = model.eliminate(torch.tensor([1, 4, 8]))
    assert sorted(some.tolist()) == [1, 4, 8]
    inner, _ = model.within(slice(2, 6)).eliminate()
    assert [c + 2 for c in inner.tolist()] == model.eliminate(torch.arange(2, 6))[0].tolist()


def test_kfac_hessian_is_the_output_error_of_any_set():
    parts, data = two_consumers()
    hessian = kfac_hessian(parts, [torch.diag(part.fisher) for part in parts])
    removed, wanted = [0, 3], 0.0
    for part, x in zip(parts, data):
        area = part.weight.shape[2]
        columns = [int(i) * area + k for c in removed for i in part.index[c] for k in range(area)]
        error = (x[:, columns] @ part.weight.flatten(1)[:, columns].T).square().mean(0)
        wanted += 0.5 * float(error @ part.fisher)
        assert (refit(part, x, removed) <= error * (1 + 1e-9)).all()
    assert 0.5 * float(hessian[removed][:, removed].sum()) == pytest.approx(wanted)
    assert torch.allclose(kfac_score(parts, [torch.diag(part.fisher) for part in parts]), 0.5 * hessian.diagonal())

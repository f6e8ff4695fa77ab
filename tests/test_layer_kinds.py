"""Curvature and criteria on every kind of layer and activation, against equal networks, differences and slices."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hobs_rspar import surgery
from hobs_rspar.criteria import filter_norms, group_norms
from hobs_rspar.curvature import passes, statistics
from hobs_rspar.curvature.filters import FilterMoments, kron_obd
from hobs_rspar.curvature.gates import GateGradients, Gates, fisher_score, gate_gradients
from hobs_rspar.curvature.kfac import KFACHessianApproximator, Wanted, fisher_diagonal
from hobs_rspar.curvature.oracle import loss_changes
from hobs_rspar.curvature.passes import affordable, sweep
from hobs_rspar.errors import UserError
from hobs_rspar.folding import folded, following_norms
from hobs_rspar.methods import _registry, _trained
from small import assert_same, images, seeded, sensitivity_options, snapshot
from test_curvature import seed

# --- linear layers on maps, tokens and rows: the same network with 1x1 convolutions

class Pointwise(nn.Module):
    """8 channels on an 8 x 8 map; pointwise layers as convolutions, or as linear layers on one of three layouts."""

    def __init__(self, layout: str = "convolution"):
        super().__init__()
        self.layout = layout
        self.stem = nn.Conv2d(2, 8, 2)
        self.inner = nn.Linear(8, 12)
        self.last = nn.Linear(12, 8)
        self.out = nn.Linear(8, 4)
        if layout == "convolution":
            self.inner, self.last = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        if self.layout != "convolution":
            x = x.permute(0, 2, 3, 1)
            x = {"maps": x, "tokens": x.flatten(1, 2), "rows": x.reshape(-1, 8)}[self.layout]
        x = F.relu(self.last(F.gelu(self.inner(x))))
        if self.layout == "rows":
            x = x.unflatten(0, (-1, 64))
        return self.out(x.flatten(2).mean(2) if self.layout == "convolution" else x.reshape(len(x), 64, 8).mean(1))


def pointwise(layout: str) -> nn.Module:
    wanted, network = seeded(Pointwise), Pointwise(layout).eval()
    network.load_state_dict({name: part.view_as(network.state_dict()[name])
                             for name, part in wanted.state_dict().items()})
    return network


@pytest.fixture(scope="module")
def by_convolutions():
    network = seeded(Pointwise)
    return network, surgery.groups(network, torch.zeros(1, 2, 9, 9))


LAYOUTS = pytest.mark.parametrize("layout", ["maps", "tokens", "rows"])


@LAYOUTS
def test_a_linear_layer_on_any_layout_has_the_gates_of_a_convolution(layout, by_convolutions):
    (other, groups), network, data = by_convolutions, pointwise(layout), images(10)
    assert [group.name for group in groups] == ["stem", "inner", "last"]
    gates, x = Gates(groups), data.normalised(data.pixels)
    seen, wanted = (gate_gradients(each, gates, data, 4) for each in (network, other))
    assert wanted.abs().max() > 1e-2 and torch.allclose(seen, wanted, atol=1e-6)
    values = torch.rand(10, gates.total, generator=seed())
    for gate in (values, values[:1]):
        with gates.applied(network, gate), gates.applied(other, gate):
            assert torch.allclose(network(x), other(x), atol=1e-5)
    assert torch.allclose(loss_changes(network, groups, data, 5), loss_changes(other, groups, data, 5), atol=1e-6)


@LAYOUTS
def test_a_linear_layer_on_any_layout_has_the_factors_and_moments_of_a_convolution(layout, by_convolutions):
    (other, groups), network, data = by_convolutions, pointwise(layout), images(10)
    found = []
    for each in (network, other):
        for whole in (True, False):
            wanted = Wanted(statistics.every_layer(each, groups), whole)
            kfac, moments = KFACHessianApproximator(each, positions=None, wanted=wanted), FilterMoments(each, groups)
            sweep(each, data, 4, [kfac, moments], seed())
            found.append(kfac.stored() | {"moments": kron_obd(groups, moments)})
    for seen, wanted in zip(found[:2], found[2:]):
        assert seen.keys() == wanted.keys() and len(seen) == 9
        for name, value in wanted.items():
            assert torch.allclose(seen[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item()), name
    for layer in ("inner", "last", "stem", "out"):
        assert torch.allclose(found[1][f"{layer}/fisher"], found[0][f"{layer}/g"][0].diagonal(), rtol=1e-4)


@LAYOUTS
def test_maps_of_linear_layers_have_the_ranks_of_a_convolutions(layout, by_convolutions):
    other, groups = by_convolutions
    seen, wanted = (_registry.method("hrank").mean_ranks(each, groups, images(6))
                    for each in (pointwise(layout), other))
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted)) and wanted[0].max() > 3


def test_channels_that_are_always_zero_have_no_fisher_where_height_is_the_number_of_channels():
    network, data = pointwise("maps"), images(32)
    with torch.no_grad():
        network.stem.weight[:3], network.stem.bias[:3] = 0, 0
    gates = Gates(surgery.groups(network, torch.zeros(1, 2, 9, 9)))
    score = gates.split(fisher_score(gate_gradients(network, gates, data, 16)))[0]
    assert (score[:3] == 0).all() and (score[3:] > 0).all()


def test_rows_that_belong_to_no_image_are_refused():
    gates = Gates(surgery.groups(seeded(Pointwise), torch.zeros(1, 2, 9, 9)))
    network = pointwise("tokens")
    network.inner.register_forward_pre_hook(lambda _m, inputs: (inputs[0][:3, 0],))
    network.last.register_forward_hook(lambda _m, _i, out: out.mean() + out.new_zeros(4, 64, 8))
    with pytest.raises(UserError, match="gets 3 rows for 4 images"):
        gate_gradients(network, gates, images(4), 4)


# --- grouped, transposed and further layers

class Many(nn.Module):
    """Grouped and transposed convolutions, two filters to a depthwise input, PReLU, layer norm and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(2, 8, 3, padding="same"), nn.PReLU(8)
        self.grouped, self.bn = nn.Conv2d(8, 12, 3, padding=1, groups=2, padding_mode="reflect"), nn.BatchNorm2d(12)
        self.mix = nn.Conv2d(12, 6, 1)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.deep = nn.Conv2d(5, 10, 3, groups=5)
        self.last, self.scale = nn.Conv2d(10, 7, 1), nn.Parameter(torch.rand(7, 1, 1))
        self.fc, self.ln, self.fc2 = nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.grouped(self.act(self.stem(x)))))
        x = self.last(F.relu(self.deep(F.relu(self.up(F.relu(self.mix(x))))))) * self.scale
        x = F.relu(self.fc2(F.gelu(self.ln(self.fc(x.permute(0, 2, 3, 1))))))
        return self.out(x.mean((1, 2)))


PRODUCERS = ("stem", "grouped", "mix", "up", "deep", "last", "fc", "fc2")


@pytest.fixture(scope="module")
def many():
    network = seeded(Many)
    return network, surgery.groups(network, torch.randn(1, 2, 9, 9, generator=seed()))


def test_every_kind_of_layer_is_in_a_group(many):
    assert [group.name for group in many[1]] == ["stem", "grouped", "mix", "up", "last", "fc", "fc2"]
    assert not any(group.protected for group in many[1])
    assert many[1].opaque == {"up": "a transposed convolution"}


def test_gates_of_every_kind_are_those_of_the_weights_and_the_brute_force_is_closing_them(many):
    (network, groups), data = many, images(6)
    gates, x = Gates(groups), data.normalised(data.pixels)
    rows = gate_gradients(network, gates, data, 4)
    changes = loss_changes(network, groups, data, 4)
    double = copy.deepcopy(network).double()
    with torch.no_grad():
        dense = F.cross_entropy(double(x.double()), data.labels, reduction="none")
    for column in range(gates.total):
        losses = []
        for value in (1 + 1e-6, 1 - 1e-6, 0):
            gate = torch.ones(1, gates.total, dtype=torch.float64).index_fill(1, torch.tensor([column]), value)
            with torch.no_grad(), gates.applied(double, gate):
                losses.append(F.cross_entropy(double(x.double()), data.labels, reduction="none"))
        assert torch.allclose(rows[:, column].double(), (losses[0] - losses[1]) / 2e-6, atol=1e-4), column
        assert float(changes[column]) == pytest.approx(float((losses[2] - dense).mean()), abs=2e-5)


def test_statistics_of_every_kind_are_complete_and_parts_agree_with_the_whole(many):
    (network, groups), data = many, images(24)
    options, before = sensitivity_options(positions=None, batch_size=8), snapshot(network)
    gates, factors = statistics.collect(network, groups, data, options, seed())
    assert all(gates[name].isfinite().all() and len(gates[name]) == groups.sizes.sum() for name in statistics.SCORES)
    layers = {"stem", "grouped", "mix", "deep", "last", "fc", "fc2", "out"}
    assert factors.keys() == {f"{name}/{part}" for name in layers for part in "ag"}
    assert factors["grouped/a"].shape == (2, 37, 37) and factors["deep/g"].shape == (5, 2, 2)
    alone = statistics.gate_statistics(network, groups, data, options, seed())
    assert all(torch.equal(gates[name], value) for name, value in alone.items()) and "kron_obd" in alone
    cheap = statistics.factors(network, statistics.consumer_layers(groups), data, options, seed())
    assert cheap.keys() == {f"{name}/{part}" for name in layers - {"stem", "deep"} for part in ("a", "fisher")}
    for name in layers - {"stem", "deep"}:
        assert torch.equal(cheap[f"{name}/a"], factors[f"{name}/a"])
        assert torch.allclose(cheap[f"{name}/fisher"], fisher_diagonal(factors, name), rtol=1e-4)
    assert_same(before, snapshot(network))


def test_norms_are_those_of_what_disappears(many):
    """Brute force: the sum over all weights before and after a channel is sliced away."""
    network, groups = many
    state = {name: part.double() for name, part in network.state_dict().items() if name != "bn.num_batches_tracked"}

    def total(state: dict, power: float, only: set[str] | None = None) -> float:
        named = {name: part for name, part in state.items()
                 if not name.endswith("bias") and "running" not in name and (only is None or name in only)}
        return sum(float(part.abs().pow(power).sum()) for part in named.values())

    for power in (1, 2):
        for g, group in enumerate(groups):
            filters = {f"{member.layer}.weight" for member in group.with_role("producer", "depthwise")}
            whole = group_norms(network, groups, power)[g], filter_norms(network, groups, power)[g]
            for channel in range(group.channels):
                kept = [[c for c in range(other.channels) if other is not group or c != channel] for other in groups]
                after = groups.sliced(state, kept)
                for norm, only in zip(whole, (None, filters)):
                    gone = total(state, power, only) - total(after, power, only)
                    assert float(norm[channel]) == pytest.approx(gone ** (1 / power)), (group.name, channel)


def test_closed_channels_are_zero_wherever_they_would_disappear(many):
    network, groups = copy.deepcopy(many[0]), many[1]
    kept = [list(range(1, group.channels)) for group in groups]
    for group in groups:
        _trained.close(network, group, [0])
    norms = group_norms(network, groups, 1)
    assert all(norm[0] == 0 and (norm[1:] > 0).all() for norm in norms)
    before, after = groups.sliced(many[0].state_dict(), kept), groups.sliced(network.state_dict(), kept)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_jtp_pulls_every_kind_of_producer(many):
    network, groups = copy.deepcopy(many[0]), many[1]
    first = torch.cat([(torch.arange(group.channels) >= 1).float() for group in groups])
    pull = _registry.method("jtp").misaligned(network, groups, first)
    pull.backward()
    kept = [list(range(1, group.channels)) for group in groups]
    before, after = network.state_dict(), groups.sliced(network.state_dict(), kept)
    norms = 0
    for name in PRODUCERS:  # nothing else is cut on the axes of these but what the group gives
        axis = 1 if name == "up" else 0
        whole, weight = before[f"{name}.weight"], after[f"{name}.weight"]
        left = whole.flatten().unsqueeze(0).eq(weight.flatten().unsqueeze(1)).any(0).view_as(whole)
        rows = left.movedim(axis, 0).flatten(1).any(1).logical_not()
        norms = norms + whole.movedim(axis, 0)[rows].norm()
        assert network.get_submodule(name).weight.grad.movedim(axis, 0)[rows].any()
        assert not network.get_submodule(name).weight.grad.movedim(axis, 0)[~rows].any()
    assert float(pull.detach()) == pytest.approx(float(norms), rel=1e-5)


def test_structalign_shrinks_closed_filters_of_every_kind(many):
    network, groups = copy.deepcopy(many[0]), many[1]
    first = torch.cat([(torch.arange(group.channels) >= 1).float() for group in groups])
    _registry.method("structalign").shrink(network, groups, first, 0.05)
    for old, new in zip(filter_norms(many[0], groups, 2), filter_norms(network, groups, 2)):
        assert new[0] < old[0] and torch.equal(new[1:], old[1:])


def test_depgraph_pulls_every_weight_of_a_group_and_leaves_frozen_ones(many):
    network, groups, method = copy.deepcopy(many[0]), many[1], _registry.method("depgraph")
    network.mix.weight.requires_grad_(False)
    F.cross_entropy(network(torch.randn(4, 2, 9, 9, generator=seed())), torch.arange(4)).backward()
    before = {key: part.grad.clone() for key, part in network.named_parameters() if part.grad is not None}
    method.pull(network, groups, method.Options(strength=0.1))
    changed = {key for key, part in network.named_parameters() if key in before
               and not torch.equal(before[key], part.grad)}
    layers = (*PRODUCERS, "act", "bn", "ln", "out")
    assert changed == {f"{layer}.weight" for layer in layers} - {"mix.weight"} | {"scale"}


def test_fpgm_measures_filters_of_transposed_and_depthwise_convolutions(many):
    network, groups = many
    up, deep = network.up.weight.detach().double().transpose(0, 1).flatten(1), network.deep.weight.detach().double()
    wanted = [torch.stack([(a - b).norm() for a in rows for b in rows]).view(len(rows), -1).sum(1)
              for rows in (up, deep.flatten(1))]
    found = _registry.method("fpgm").distances(network, groups.named("up"))
    assert torch.allclose(found, wanted[0] + wanted[1].view(5, 2).sum(1))


def test_autocompress_zeroes_the_least_filters_of_every_kind(many):
    network, groups = copy.deepcopy(many[0]), many[1]
    widths = [max(1, group.channels // 2) for group in groups]
    found = dict(_registry.method("autocompress").nearest_of_widths(network, groups, widths))
    assert found.keys() == set(PRODUCERS) and torch.equal(found["up"], network.up.weight)
    for old, new, width in zip(filter_norms(many[0], groups, 2), filter_norms(network, groups, 2), widths):
        gone = torch.argsort(old, stable=True)[:len(old) - width]
        assert (new[gone] == 0).all() and int((new == 0).sum()) == len(gone)


def test_udfc_folds_only_what_its_formula_covers(many):
    udfc = _registry.method("udfc")
    assert not any(udfc.plain(many[0], group) for group in many[1])
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=False).eval()
    norm.running_mean.normal_()
    bare = nn.Conv2d(3, 5, 3, bias=False)
    bare.weight = layer.weight
    shifted = copy.deepcopy(norm)
    shifted.running_mean -= layer.bias.detach()  # the same function without a bias
    kept, gone = torch.tensor([0, 1, 4]), torch.tensor([2, 3])
    assert torch.allclose(udfc.coefficients(layer, norm, kept, gone, 0.5),
                          udfc.coefficients(bare, shifted, kept, gone, 0.5), atol=1e-6)


# --- activations in place

class Activated(nn.Module):
    """A shortcut of what an activation has changed in place, a norm behind an activation, and a late change."""

    def __init__(self, inplace: bool = False):
        super().__init__()
        self.stem, self.after = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act, self.swish = nn.ReLU(inplace), nn.Hardswish(inplace)
        self.one, self.one_bn = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.two_bn = nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.block = nn.Sequential(nn.ReLU(inplace), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace))
        self.fc, self.out = nn.Linear(6, 5), nn.Linear(5, 4)
        self.inplace = inplace

    def forward(self, x):
        x = self.after(self.act(self.stem(x)))  # not to be folded: the activation is in between
        y = self.swish(self.one_bn(self.one(x)))
        x = x + self.two_bn(self.two(y))
        y = self.block(x)  # changes x, too, if in place
        x = (x if self.inplace else F.relu(x)) + y
        return self.out(self.act(self.fc(x.mean((2, 3)))))


def test_activations_in_place_change_nothing():
    plain, data = seeded(Activated), images(20)
    placed = Activated(True).eval()
    placed.load_state_dict(plain.state_dict())
    groups = surgery.groups(plain, torch.randn(1, 2, 9, 9, generator=seed()))
    x = data.normalised(data.pixels)
    assert torch.allclose(plain(x), placed(x), atol=1e-6)
    assert set(following_norms(placed, x[:1])) == set(following_norms(plain, x[:1])) == {"one", "two"}
    with folded(placed, x[:1]):
        assert torch.allclose(plain(x), placed(x), atol=1e-5)
    options = sensitivity_options(batch_size=8)
    wanted, seen = (statistics.collect(each, groups, data, options, seed()) for each in (plain, placed))
    for part, other in zip(wanted, seen):
        for name, value in part.items():
            assert torch.allclose(other[name], value, rtol=1e-3, atol=1e-4 * value.abs().max().item()), name
    changes = [loss_changes(each, groups, data, 8) for each in (plain, placed)]
    assert torch.allclose(*changes, atol=1e-6) and changes[0].abs().max() > 1e-2
    ranks = [_registry.method("hrank").mean_ranks(each, groups, data) for each in (plain, placed)]
    assert all(torch.equal(a, b) for a, b in zip(*ranks))


class Late(nn.Module):
    """Changes in place what a layer has read; a frozen linear layer lets autograd pass over it."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc, self.out = nn.Linear(162, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.stem(x.flatten(1)).mul(2)
        y = self.fc(x)
        x.mul_(0)
        return self.out(F.relu(y)) + x.sum()


def test_an_input_that_is_changed_after_it_was_read_is_refused():
    network = Late().eval()
    groups = surgery.groups(seeded(Plainer), torch.zeros(1, 2, 9, 9))
    wanted = Wanted(dict.fromkeys(("stem", "fc", "out")))
    for watcher in (GateGradients(network, Gates(groups), 4), KFACHessianApproximator(network, 1e-3, 1, wanted=wanted)):
        with pytest.raises(UserError, match="the input of 'fc' is changed in place after 'fc' has read it"):
            sweep(network, images(4), 4, [watcher])


class Plainer(Late):
    def forward(self, x):
        return self.out(F.relu(self.fc(self.stem(x.flatten(1)))))


# --- the sweep

def test_a_pass_is_as_large_as_its_memory_allows(many, monkeypatch):
    (network, groups), data = many, images(24)
    gates = Gates(groups)
    wanted = gate_gradients(network, gates, data, 24)
    x, sizes = data.normalised(data.pixels[:1]), []
    with torch.enable_grad():
        each = passes._kept(network, torch.cat([x, x, x])) - passes._kept(network, torch.cat([x, x]))
    assert each > 4 * sum(out.numel() for out in (network.stem(x), network.mix(network.grouped(network.stem(x)))))
    monkeypatch.setattr(passes, "BYTES", 5 * each + 3)
    assert affordable(network, x, 24) == 5 and affordable(network, x, 3) == 3 and affordable(network, x, 1) == 1
    monkeypatch.setattr(passes, "BYTES", 1)
    assert affordable(network, x, 24) == 1
    handle = network.stem.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    assert torch.allclose(gate_gradients(network, gates, data, 24), wanted, atol=1e-5)
    handle.remove()
    assert sizes[-24:] == [1] * 24


def test_a_sweep_keeps_no_inputs_until_its_end():
    """In the backward pass of a layer, those of the layers behind it are gone."""
    network = nn.Sequential(*(part for _ in range(6) for part in (nn.Conv2d(2, 2, 1), nn.ReLU())), nn.Flatten(),
                            nn.Linear(162, 4)).eval()
    kfac = KFACHessianApproximator(network, 1e-3, 1)
    waiting = []
    add = kfac._add
    kfac._add = lambda name, seen, gradient: (waiting.append(len(kfac._waiting)), add(name, seen, gradient))
    sweep(network, images(4), 4, [kfac], seed())
    assert waiting == [0] * 7 and len(kfac.factors) == 7
    whole, released = kfac.stored(), kfac.stored(release=True)
    assert whole.keys() == released.keys() and all(torch.equal(whole[name], released[name]) for name in whole)
    assert not kfac.factors


@pytest.mark.parametrize("spoil, message", [
    (lambda network, data: network.stem.weight.data.fill_(torch.nan), "outputs that are not finite"),
    (lambda network, data: data.labels.fill_(7), "labels go from 7 to 7, but Many has 4 outputs"),
    (lambda network, data: network.out.register_forward_hook(lambda _m, _i, out: out.detach()),
     "Many cannot be differentiated"),
    (lambda network, data: network.mix.register_forward_hook(lambda _m, _i, out: (out.exp_(), out.mul_(2))[0]),
     "Many cannot be differentiated, so it has no curvature: .*inplace"),
])
def test_a_sweep_refuses_in_one_sentence(many, spoil, message):
    network, data = copy.deepcopy(many[0]), images(8)
    data = replace(data, labels=data.labels.clone())
    spoil(network, data)
    before = snapshot(network)
    with pytest.raises(UserError, match=message):
        gate_gradients(network, Gates(many[1]), data, 8)
    after = snapshot(network)
    assert before["gradients"] == after["gradients"] and before["hooks"] == after["hooks"]


class Twice(nn.Module):
    """Calls a layer twice, one never, and has a table that all images share."""

    def __init__(self):
        super().__init__()
        self.stem, self.twice, self.never = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(3, 3)
        self.table, self.out = nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.twice(F.relu(self.twice(x)))) + self.table(torch.eye(5)).mean(0)[:, None, None]
        return self.out(x.mean((2, 3)))


def test_layers_that_are_called_twice_or_never_break_no_sweep():
    network, data = seeded(Twice), images(16)
    groups = surgery.groups(network, torch.zeros(1, 2, 9, 9))
    kfac, moments = KFACHessianApproximator(network, 1e-3, 1), FilterMoments(network, groups)
    moments.layers = {name: network.get_submodule(name) for name in ("stem", "twice", "never", "table", "out")}
    sweep(network, data, 8, [kfac, moments, GateGradients(network, Gates(groups), 16)], seed())
    assert set(kfac.factors) == {"stem", "twice", "out"}
    assert kfac.opaque == {"table": "it works on a table that all images share"}
    assert moments.energy("never").tolist() == [0, 0, 0] and moments.fisher("table").tolist() == [0] * 6
    with pytest.raises(UserError, match="no factors for layer 'table': it works on a table"):
        kfac.compute_fisher_diagonal("table")

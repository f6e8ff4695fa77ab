"""Repair: what least squares and batch-norm statistics must give exactly."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hobs_rspar import slicing, surgery
from hobs_rspar.curvature import observe, repair
from hobs_rspar.errors import UserError
from hobs_rspar.training import logits
from small import (
    IMAGES,
    Joined,
    Mixed,
    Plain,
    Stream,
    assert_same,
    images,
    plan_of,
    random_kept,
    seeded,
    snapshot,
    trained_mixed,
)


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"positions": 200, "ridge": 1e-3} | changes)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def without(network: nn.Module, removed: dict[str, list[int]]):
    """Groups, kept channels and the pruned network."""
    groups = surgery.groups(network, IMAGES[:1])
    kept = [sorted(set(range(g.channels)) - set(removed.get(g.name, []))) for g in groups]
    return groups, kept, slicing.remove(network, groups, plan_of(groups, kept))


# --- least squares

@torch.no_grad()
def with_copies() -> nn.Module:
    """Plain, in which channels 1 and 6 of the first layer are multiples of others, and 3 of the second is constant."""
    network = seeded(Plain)
    first, second = network.first, network.second
    first.weight[1], first.bias[1] = 2 * first.weight[4], 2 * first.bias[4]
    first.weight[6], first.bias[6] = 0.5 * first.weight[0], 0.5 * first.bias[0]
    second.weight[3], second.bias[3] = 0, 0.8
    return network


def test_channels_that_are_copies_cost_nothing():
    network, data = with_copies(), images(64)
    groups, kept, pruned = without(network, {"first": [1, 6], "second": [3]})
    before = snapshot(network)
    wanted, cut = logits(network, data), logits(pruned, data)
    scale = wanted.std()
    assert (cut - wanted).abs().max() > 0.1 * scale
    error = repair.least_squares(pruned, network, groups, kept, data, options(ridge=1e-9), seed())
    assert (logits(pruned, data) - wanted).abs().max() < 1e-3 * scale
    assert error < 1e-6
    assert_same(before, snapshot(network))
    assert not pruned.training and all(p.requires_grad for p in pruned.parameters())


def test_the_refit_is_the_least_squares_optimum():
    """The second layer of a pruned network, solved with torch.linalg.lstsq on all its patches and a constant."""
    network, data = seeded(Plain), images(48)
    groups, kept, pruned = without(network, {"first": [0, 5, 7]})
    x = data.normalised(data.pixels)
    with torch.no_grad():
        hidden = F.relu(pruned.first(x))
        rows = F.unfold(hidden, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1).double()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], 1)
        target = network.second(F.relu(network.first(x))).flatten(2).transpose(1, 2).flatten(0, 1).double()
    best = torch.linalg.lstsq(rows, target).solution
    repair.least_squares(pruned, network, groups, kept, data, options(ridge=1e-9), seed())
    seen = torch.cat([pruned.second.weight.detach().flatten(1).T, pruned.second.bias.detach()[None]])
    assert torch.allclose(seen.double(), best, atol=1e-4)


def test_later_layers_are_fitted_to_what_earlier_ones_really_give():
    """The linear layer sees the repaired second layer's outputs, not the dense ones."""
    network, data = seeded(Plain), images(200)
    groups, kept, pruned = without(network, {"first": [0, 5, 7], "second": [1]})
    repair.least_squares(pruned, network, groups, kept, data, options(ridge=1e-9), seed())
    x = data.normalised(data.pixels)
    with torch.no_grad():
        seen = F.relu(pruned.second(F.relu(pruned.first(x)))).flatten(1).double()
        rows = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.float64)], 1)
        residual = network(x).double() - rows @ torch.linalg.lstsq(rows, network(x).double()).solution
        mine = network(x) - pruned(x)
    assert mine.square().sum() == pytest.approx(residual.square().sum().item(), rel=1e-3)


def test_ridge_pulls_towards_smaller_weights():
    network, data = seeded(Plain), images(64)
    norms = []
    for ridge in (1e-6, 1e-1, 10):
        groups, kept, pruned = without(network, {"first": [2]})
        repair.least_squares(pruned, network, groups, kept, data, options(ridge=ridge), seed())
        norms.append(pruned.second.weight.norm().item())
    assert norms[0] > norms[1] > norms[2]


@pytest.mark.parametrize(("kind", "number"), [(Joined, 0), (Joined, 1), (Stream, 0), (Stream, 1)])
def test_repair_brings_the_outputs_nearer(kind, number):
    network, data = seeded(kind), images(256)
    repair.reestimate_batchnorm(network, data)
    groups = surgery.groups(network, IMAGES[:1])
    kept = random_kept(groups, number, least=0.6)
    pruned = slicing.remove(network, groups, plan_of(groups, kept))
    held_out = images(128, seed=5)
    normed = copy.deepcopy(pruned)
    repair.reestimate_batchnorm(normed, data)
    repaired = copy.deepcopy(pruned)
    repair.least_squares(repaired, network, groups, kept, data, options(), seed())
    wanted = logits(network, held_out)
    off = [(logits(net, held_out) - wanted).square().mean().item() for net in (pruned, repaired)]
    assert off[1] < 0.5 * off[0]
    errors = [repair.reconstruction_error(net, network, groups, kept, held_out, 40, seed(1))
              for net in (pruned, normed, repaired)]
    assert errors[2] < 0.5 * errors[0] and errors[2] < errors[1]


def test_repair_is_repeatable_and_samples_positions():
    network, data = seeded(Stream), images(64)
    groups, kept, pruned = without(network, {"stem": [0, 3, 9], "down": [5, 6]})
    states = []
    for number in (0, 0, 1):
        again = copy.deepcopy(pruned)
        repair.least_squares(again, network, groups, kept, data, options(positions=10), seed(number))
        states.append(again.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_only_consumers_of_shrunken_groups_are_refitted():
    network, data = seeded(Plain), images(32)
    groups, kept, pruned = without(network, {"second": [0]})
    before = pruned.second.weight.clone()
    repair.least_squares(pruned, network, groups, kept, data, options(), seed())
    assert torch.equal(pruned.second.weight, before)
    assert not torch.equal(pruned.out.weight, network.out.weight[:, 25:])


def test_what_the_plan_asks_for_is_done():
    network, data = seeded(Mixed), images(64)
    groups = surgery.groups(network, IMAGES[:1])
    kept = random_kept(groups, 0)
    plan = plan_of(groups, kept)
    cut = slicing.remove(network, groups, plan)
    states = {}
    for kind in repair.REPAIRS:
        pruned = copy.deepcopy(cut)
        object.__setattr__(plan, "repair", kind)
        repair.carry_out(plan, pruned, network, groups, data, options(), seed())
        states[kind] = pruned
    assert torch.equal(states["none"].hidden.weight, cut.hidden.weight)
    assert torch.equal(states["none"].stem_bn.running_mean, cut.stem_bn.running_mean)
    assert torch.equal(states["batchnorm"].hidden.weight, cut.hidden.weight)
    assert not torch.equal(states["batchnorm"].project_bn.running_mean, cut.project_bn.running_mean)
    assert not torch.equal(states["least_squares"].hidden.weight, cut.hidden.weight)
    object.__setattr__(plan, "repair", "least_square")
    with pytest.raises(UserError, match="repair 'least_square' is not known. Did you mean 'least_squares'"):
        repair.carry_out(plan, cut, network, groups, data, options(), seed())


# --- more images than fit at once

@pytest.fixture
def small_batches(monkeypatch):
    """Not all images fit at once: sums over batches that wait for each other."""
    for name, value in {"HELD": 1, "SMALLEST": 16}.items():
        monkeypatch.setattr(repair, name, value)


@pytest.mark.parametrize(("kind", "removed"), [(Plain, {"first": [0, 5, 7], "second": [1]}),
                                               (Joined, {"left": [1], "right": [0, 4], "join": [2, 3]})])
def test_batches_in_step_are_all_images_at_once(monkeypatch, kind, removed):
    """Exactly, but for batch norms, whose statistics are a batch's: of one batch they are all images'."""
    network, data = seeded(kind), images(150)
    groups, kept, pruned = without(network, removed)
    found = []
    for held, smallest in ((repair.HELD, 32), (1, 32 if kind is Plain else 150)):
        monkeypatch.setattr(repair, "HELD", held)
        monkeypatch.setattr(repair, "SMALLEST", smallest)
        again = copy.deepcopy(pruned)
        error = repair.least_squares(again, network, groups, kept, data, options(positions=10), seed())
        found.append((error, again))
    (once, first), (summed, second) = found
    assert summed == pytest.approx(once, rel=1e-3) and once > 1e-3
    for name, tensor in first.state_dict().items():
        assert torch.allclose(tensor.float(), second.state_dict()[name].float(), rtol=1e-2, atol=1e-3), name


def test_batches_in_step_are_all_images_at_once_with_batch_norms_too(monkeypatch):
    network, data = seeded(Stream), images(256)
    repair.reestimate_batchnorm(network, data)
    groups, kept, pruned = without(network, {"stem": [0, 3, 9, 20], "inner": [2], "down": [5, 6, 7, 40]})
    held_out, errors = images(128, seed=5), []
    for held in (2**29, 1):
        monkeypatch.setattr(repair, "HELD", held)
        again = copy.deepcopy(pruned)
        repair.least_squares(again, network, groups, kept, data, options(), seed())
        errors.append(repair.reconstruction_error(again, network, groups, kept, held_out, 40, seed(1)))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_what_is_held_is_bounded(small_batches, monkeypatch):
    """No pass has more images than a batch, and no batch runs beyond the last layer that is looked at."""
    network, data = seeded(Stream), images(100)
    groups, kept, pruned = without(network, {"stem": [0], "inner": [2]})
    sizes, ended = [], []
    for which in (network, pruned):
        which.stem.register_forward_pre_hook(lambda _layer, x: sizes.append(len(x[0])))
        which.out.register_forward_hook(lambda _layer, x, _out: ended.append(len(x[0])))
    monkeypatch.setattr(repair, "reestimate_batchnorm", lambda *_, **__: None)
    repair.least_squares(pruned, network, groups, kept, data, options(), seed())
    assert max(sizes) <= 2 * 16 and sum(size for size in sizes if size > 1) == 2 * 100
    assert set(ended) == {1}  # looks at a single image


def test_batches_have_no_small_rest():
    for count, size in ((100, 32), (33, 32), (31, 32), (64, 32), (1, 32)):
        lengths = [len(part) for part in repair._batches(images(count), size)]
        assert sum(lengths) == count and min(lengths) >= min(count, size)


def test_reconstruction_error_over_batches(small_batches, monkeypatch):
    network, data = seeded(Plain), images(77)
    groups, kept, pruned = without(network, {"first": [0, 5], "second": [2]})
    several = repair.reconstruction_error(pruned, network, groups, kept, data, 20, seed())
    monkeypatch.setattr(repair, "SMALLEST", 100)
    assert several == pytest.approx(repair.reconstruction_error(pruned, network, groups, kept, data, 20, seed()))


# --- layers of other kinds

class Kinds(nn.Module):
    """A convolution that wraps around, one in groups, squeeze and excitation, a linear layer on maps, batch norms."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(2, 12, 3, padding=1)
        self.wrap = nn.Conv2d(12, 8, 3, padding=1, padding_mode="circular")
        self.groups = nn.Conv2d(8, 12, 3, padding="same", groups=2)
        self.squeeze, self.excite = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.mix, self.bn = nn.Linear(12, 10), nn.BatchNorm1d(10)
        self.out = nn.Linear(10, classes)

    def forward(self, x):
        x = F.relu(self.wrap(F.relu(self.stem(x))))
        x = F.relu(self.groups(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.mix(x.permute(0, 2, 3, 1)))
        return self.out(F.relu(self.bn(x.mean((1, 2)))))


def repaired_kinds(monkeypatch, held: int) -> tuple[list[float], dict[str, bool]]:
    """The consumers' error before and after, and of each layer whether its weight was changed."""
    network, data = seeded(Kinds), images(300)
    repair.reestimate_batchnorm(network, data)
    groups = surgery.groups(network, IMAGES[:1])
    kept = [list(range(group.channels if group.protected else group.channels - 2)) for group in groups]
    kept = [part if len(part) < 8 else [*part[:3], *part[5:]] for part in kept]
    pruned = slicing.sliced(network, groups, kept)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    monkeypatch.setattr(repair, "HELD", held)
    error = [repair.reconstruction_error(pruned, network, groups, kept, data, 40, seed(1))]
    repair.least_squares(pruned, network, groups, kept, data, options(), seed())
    error.append(repair.reconstruction_error(pruned, network, groups, kept, data, 40, seed(1)))
    changed = {name: not torch.equal(before[f"{name}.weight"], layer.weight)
               for name, layer in pruned.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    return error, changed


@pytest.mark.parametrize("held", [2**29, 1])
def test_every_kind_of_layer_is_refitted(monkeypatch, held):
    error, changed = repaired_kinds(monkeypatch, held)
    assert changed == {"stem": False, **dict.fromkeys(("wrap", "groups", "squeeze", "excite", "mix", "out"), True)}
    assert error[1] < 0.75 * error[0]


def test_statistics_of_one_dimensional_batch_norms_are_estimated_anew(monkeypatch):
    network, data = seeded(Kinds), images(64)
    x = {}
    hook = network.bn.register_forward_hook(lambda _m, inputs, _out: x.update(seen=inputs[0].clone()))
    repair.reestimate_batchnorm(network, data)
    hook.remove()
    assert torch.allclose(network.bn.running_mean, x["seen"].mean(0), atol=1e-6)


def test_layers_that_cannot_be_given_a_weight_are_left_alone():
    """Opaque layers, layers that are called twice, and layers that share their weight."""
    network, data = seeded(Plain), images(64)
    groups, kept, pruned = without(network, {"first": [1, 2], "second": [0]})
    groups.opaque["second"] = "a forward of its own"
    before = pruned.second.weight.clone()
    repair.least_squares(pruned, network, groups, kept, data, options(), seed())
    assert torch.equal(before, pruned.second.weight)
    assert observe.shrunk_consumers(network, groups, kept, data, 10, seed()).names == ["out"]
    network.again = network.out
    assert observe.shrunk_consumers(network, groups, kept, data, 10, seed()).names == []


def test_outputs_end_with_the_last_layer_and_leave_no_hooks():
    network, data = seeded(Plain), images(8)
    groups, kept, _ = without(network, {"first": [1]})
    layers = observe.shrunk_consumers(network, groups, kept, data, 5, seed())
    before, x = snapshot(network), data.normalised(data.pixels)
    rows = observe.outputs(network, layers, x)["second"]
    with torch.no_grad():
        whole = network.second(F.relu(network.first(x))) - network.second.bias[:, None, None]
    assert torch.equal(rows.view(8, 5, -1), whole.flatten(2)[:, :, layers.positions["second"]].transpose(1, 2))
    assert_same(before, snapshot(network))
    with pytest.raises(RuntimeError):  # an error of the network itself is not swallowed
        observe.outputs(network, layers, x[:, :1])
    assert_same(before, snapshot(network))


# --- batch-norm statistics

def test_batchnorm_statistics_by_hand():
    network, data = seeded(Mixed), images(80)
    affine = {name: p.clone() for name, p in network.named_parameters()}
    modes = [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    repair.reestimate_batchnorm(network, data, batch_size=32)
    x = data.normalised(data.pixels)
    means, variances = [], []
    with torch.no_grad():
        for part in x.split(32):
            stem = network.stem(part)
            mean, variance = stem.mean((0, 2, 3)), stem.var((0, 2, 3), correction=0)
            stem = (stem - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
            stream = F.relu(stem * network.stem_bn.weight[:, None, None] + network.stem_bn.bias[:, None, None])
            inner = network.expand(stream)  # normalised by the batch's own statistics, as in training
            means.append((mean, inner.mean((0, 2, 3))))
            variances.append((network.stem(part).var((0, 2, 3)), inner.var((0, 2, 3))))
    for norm, k in ((network.stem_bn, 0), (network.expand_bn, 1)):
        assert torch.allclose(norm.running_mean, torch.stack([m[k] for m in means]).mean(0), atol=1e-5)
        assert torch.allclose(norm.running_var, torch.stack([v[k] for v in variances]).mean(0), rtol=1e-4)
    assert [m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == modes
    assert all(torch.equal(affine[name], p) for name, p in network.named_parameters())
    assert not any(m.training for m in network.modules())


def test_statistics_do_not_depend_on_those_before():
    first, second = seeded(Mixed), seeded(Mixed)
    with torch.no_grad():
        second.stem_bn.running_mean += 7
        second.expand_bn.running_var *= 3
    for network in (first, second):
        repair.reestimate_batchnorm(network, images(64))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


class Pooled(nn.Module):
    """A batch norm after global pooling: one value per image and channel."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 1)
        self.bn, self.out = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        pooled = F.relu(self.first(x)).mean((2, 3), keepdim=True)
        return self.out(F.relu(self.bn(self.second(pooled))).flatten(1))


def test_a_last_batch_of_one_image():
    network = seeded(Pooled)
    repair.reestimate_batchnorm(network, images(257))
    assert torch.isfinite(network.bn.running_var).all()


def test_least_squares_with_a_last_batch_of_one_image():
    network = seeded(Pooled)
    groups = surgery.groups(network, IMAGES[:1])
    kept = [list(range(8)), [0, 2, 3, 4, 6, 7]]
    pruned = slicing.sliced(network, groups, kept)
    repair.least_squares(pruned, network, groups, kept, images(257), options(), seed())
    assert all(torch.isfinite(tensor).all() for tensor in pruned.state_dict().values())


# --- reconstruction error

def test_reconstruction_error_of_the_unpruned_network_is_zero():
    network, data = trained_mixed(), images(32)
    groups, kept, pruned = without(network, {})
    assert repair.reconstruction_error(pruned, network, groups, kept, data, 20, seed()) == 0
    groups, kept, _ = without(network, {"down": [1]})
    assert repair.reconstruction_error(network, network, groups, kept, data, 20, seed()) == 0  # a real comparison


def test_reconstruction_error_by_hand():
    network, data = seeded(Plain), images(32)
    groups, kept, pruned = without(network, {"first": [0, 5], "second": [2]})
    x = data.normalised(data.pixels)
    with torch.no_grad():
        hidden, less = F.relu(network.first(x)), F.relu(pruned.first(x))
        pairs = [(network.second(hidden)[:, kept[1]], pruned.second(less)), (network(x), pruned(x))]
    wanted = 0.0
    for target, seen in pairs:
        target, seen = (part.transpose(0, 1).flatten(1) for part in (target, seen))
        target, seen = target - target.mean(1, keepdim=True), seen - seen.mean(1, keepdim=True)
        wanted += float((seen - target).square().sum() / target.square().sum()) / 2
    found = repair.reconstruction_error(pruned, network, groups, kept, data, 10**6, seed())
    assert found == pytest.approx(wanted, rel=1e-4) and found > 0.01

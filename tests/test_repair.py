"""Repair: what least squares and batch-norm statistics must give exactly."""

import copy
from types import SimpleNamespace

import pytest
import torch
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
from torch import nn
from torch.nn import functional as F

from hobs_rspar import surgery
from hobs_rspar.curvature import repair
from hobs_rspar.errors import UserError
from hobs_rspar.training import logits


def options(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"positions": 200, "ridge": 1e-3} | changes)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def without(network: nn.Module, removed: dict[str, list[int]]):
    """Groups, kept channels and the pruned network."""
    groups = surgery.groups(network, IMAGES[:1])
    kept = [sorted(set(range(g.channels)) - set(removed.get(g.name, []))) for g in groups]
    return groups, kept, surgery.remove(network, IMAGES[:1], plan_of(groups, kept))


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
    pruned = surgery.remove(network, IMAGES[:1], plan_of(groups, kept))
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
    cut = surgery.remove(network, IMAGES[:1], plan)
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
    pruned = surgery.remove_filters(network, IMAGES[:1], {"second": [1, 5]})
    kept = [list(range(8)), [0, 2, 3, 4, 6, 7]]
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

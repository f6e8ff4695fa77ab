"""Least squares of single layers, from rows and from sums over batches; and from stored covariances at every width."""

import copy

import pytest
import torch
from torch import nn

from hobs_rspar import surgery
from hobs_rspar.allocation import refits
from hobs_rspar.allocation.environment import PruningEnvironment, affordable
from hobs_rspar.allocation.refits import Refits
from hobs_rspar.coupling import Group, Groups, Member
from hobs_rspar.curvature.consumers import consumers
from hobs_rspar.curvature.kfac import damped
from hobs_rspar.curvature.refit import Moments, refit
from hobs_rspar.data import Images
from hobs_rspar.training import logits
from small import ZOO, Mixed, images, seeded, statistics_of, zoo, zoo_groups
from test_elimination import grouped

LAYERS = {"linear": (nn.Linear(12, 5), 1), "convolution": (nn.Conv2d(4, 6, 3), 1),
          "no bias": (nn.Conv2d(6, 4, 2, bias=False), 1), "groups": (nn.Conv2d(8, 6, 2, groups=2), 2)}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def problem(name: str, count: int, offset: float = 0.0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer, rows [groups, count, d + 1] and wanted outputs [count, outputs] that are nearly linear in them."""
    layer, groups = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    d, random = layer.weight[0].numel(), seed(1)
    x = torch.randn(groups, count, d, generator=random) @ torch.randn(d, d, generator=random) + offset
    outputs = len(layer.weight) // groups
    y = torch.cat([part @ torch.randn(d, outputs, generator=random) for part in x], 1)
    y = y + 0.3 * torch.randn(y.shape, generator=random) + offset
    return layer, torch.cat([x, torch.ones(groups, count, 1)], 2), y


def best(rows: torch.Tensor, target: torch.Tensor, layer: nn.Module, ridge: float, pull: bool) -> torch.Tensor:
    """The weight [outputs, d] by torch.linalg.lstsq in double precision, with the ridge as further rows."""
    parts = []
    outputs = len(layer.weight) // len(rows)
    for i, own in enumerate(rows.double()):
        x, y = own[:, :-1] - own[:, :-1].mean(0), target[:, i * outputs:(i + 1) * outputs].double()
        before = layer.weight[i * outputs:(i + 1) * outputs].detach().double().flatten(1).T
        root = (ridge * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        prior = root @ before if pull else torch.zeros(x.shape[1], outputs, dtype=torch.float64)
        parts.append(torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y - y.mean(0), prior])).solution.T)
    return torch.cat(parts)


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize(("count", "few"), [(400, False), (60, True), (10, True)])  # many rows, few, fewer than inputs
def test_a_refit_is_least_squares(name, count, few):
    layer, rows, target = problem(name, count)
    few = few and count < 4 * layer.weight[0].numel()
    wanted = best(rows, target, layer, 0.1, few)
    before = None if layer.bias is None else layer.bias.detach().clone()
    error = refit(layer, rows, target, 0.1)
    assert torch.allclose(layer.weight.detach().double().flatten(1), wanted, rtol=1e-3, atol=1e-4)
    outputs = torch.cat([own[:, :-1] @ weight.T for own, weight
                         in zip(rows, layer.weight.detach().flatten(1).chunk(len(rows)))], 1)
    if before is not None:  # the bias takes the means up
        assert torch.allclose(layer.bias - before, (target - outputs).mean(0), atol=1e-3)
    off = outputs - target
    centred = [part - part.mean(0) for part in (off, target)]
    assert error == pytest.approx(float(centred[0].square().sum() / centred[1].square().sum()), rel=1e-3)


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("count", [400, 60])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_sums_over_batches_give_the_refit_of_all_rows(name, count, offset):
    layer, rows, target = problem(name, count, offset)
    other = copy.deepcopy(layer)
    moments = Moments(other)
    for own, wanted in zip(rows.split(37, 1), target.split(37)):
        moments.add(own, wanted)
    errors = refit(layer, rows, target, 0.01), moments.refit(0.01)
    assert errors[1] == pytest.approx(errors[0], rel=0.01, abs=1e-5)
    assert torch.allclose(layer.weight, other.weight, rtol=1e-2, atol=2e-3)
    if layer.bias is not None:
        assert torch.allclose(layer.bias, other.bias, rtol=1e-2, atol=2e-3 * max(1, offset))


def test_few_rows_leave_what_they_do_not_show_as_it_was():
    """The ridge pulls to the weight that the layer has: directions in which no row varies keep their weights."""
    layer, rows, target = problem("linear", 6)
    before, x = layer.weight.detach().clone(), rows[0, :, :-1] - rows[0, :, :-1].mean(0)
    refit(layer, rows, target, 1e-3)
    unseen = torch.linalg.svd(x).Vh[5:]  # of 6 rows less their mean
    assert torch.allclose(layer.weight @ unseen.T, before @ unseen.T, atol=1e-4)
    assert not torch.allclose(layer.weight, before, atol=0.1)


# --- at every width, from stored covariances

def compensated(part, gone: list[int], ridge: float) -> torch.Tensor:
    """W A_:K (A_KK)^-1 with the damped A [outputs, d], zero for columns that are gone."""
    place = {int(c): i for i, c in enumerate(range(len(part.index)) if part.channels is None else part.channels)}
    dead = {int(i) for channel in gone if channel in place for i in part.columns[place[channel]]}
    keep = [i for i in range(len(part.covariance)) if i not in dead]
    a, weight = damped(part.covariance, ridge), part.weight.flatten(1)
    found = torch.zeros_like(weight)
    found[:, keep] = weight @ a[:, keep] @ torch.linalg.inv(a[keep][:, keep])
    return found


@pytest.fixture
def factorised(monkeypatch):
    monkeypatch.setattr(refits, "SOLVED", 0)


def test_a_leading_block_of_one_factor_gives_every_width(factorised):
    network, groups = zoo("resnet8"), zoo_groups("resnet8")
    _, factors = statistics_of("resnet8")
    order = [torch.randperm(group.channels, generator=seed(g)) for g, group in enumerate(groups)]
    ours = Refits(network, groups, order, factors, 1e-2)
    for g, group in enumerate(groups):
        parts = consumers(group, network, factors)
        for width in (group.channels - 1, group.channels // 2, 1):
            gone = order[g][:group.channels - width].tolist()
            change = ours.change(g, width)
            assert change.keys() == {f"{part.source[0]}.weight" for part in parts}
            for part in parts:
                seen = part.weight.flatten(1) + change[f"{part.source[0]}.weight"].flatten(1)
                wanted = compensated(part, gone, 1e-2)
                kept = wanted.abs().sum(0) > 0  # the others are cut off
                assert torch.allclose(seen[:, kept], wanted[:, kept], rtol=1e-2, atol=1e-4)
        assert ours.change(g, group.channels) == {}


def test_only_the_last_changes_are_kept_and_a_forgotten_one_comes_back_the_same(monkeypatch):
    monkeypatch.setattr(refits, "KEPT", 2**17)  # of resnet8's changes, of 9 to 150 KiB each
    network, groups = zoo("resnet8"), zoo_groups("resnet8")
    ours = Refits(network, groups, [torch.arange(group.channels) for group in groups],
                  statistics_of("resnet8")[1], 1e-2)
    asked = [(g, width) for g in range(len(groups)) for width in (1, 2, 3)]
    first = [ours.change(*key) for key in asked]
    assert sum(tensor.nbytes for kept in ours._known.values() for tensor in kept.values()) <= 2**17 or \
        len(ours._known) == 1
    assert 0 < len(ours._known) < len(asked) and list(ours._known)[-1] == asked[-1]
    for key, wanted in zip(asked, first):
        again = ours.change(*key)
        assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("solved", [0, 10**6])
def test_every_group_of_a_convolution_and_every_channel_order(monkeypatch, solved):
    monkeypatch.setattr(refits, "SOLVED", solved)
    network, group, factors = grouped()
    order = torch.tensor([2, 0, 3, 1])
    change = Refits(network, Groups([group], {}), [order], factors, 1e-6).change(0, 2)
    parts = consumers(group, network, factors)
    for part in parts:
        layer, i = part.source
        outputs = len(part.weight)
        own = change[f"{layer}.weight"][i * outputs:(i + 1) * outputs].flatten(1) + part.weight.flatten(1)
        wanted = compensated(part, [2, 0], 1e-6)
        kept = wanted.abs().sum(0) > 0
        assert int(kept.sum()) == wanted.shape[1] // 2
        assert torch.allclose(own[:, kept].double(), wanted[:, kept], rtol=1e-3, atol=1e-4)


def test_blocks_of_a_wide_layer_change_their_own_columns(factorised):
    network = nn.ModuleDict({"wide": nn.Linear(6, 3)})
    rows = torch.cat([torch.randn(2, 40, 4, generator=seed(4)), torch.ones(2, 40, 1)], 2)
    a = rows.mT @ rows
    a[1, [2, 3]] = a[1, :, [2, 3]] = 0  # the second block has two columns alone
    columns = torch.tensor([[0, 1, 4, 5], [2, 3, -1, -1]])
    factors = {"wide/a": a, "wide/columns": columns, "wide/fisher": torch.ones(3)}
    group = Group("before", 3, (Member("wide", "consumer", ((0, 1), (2, 3), (4, 5))),))
    change = Refits(network, Groups([group], {}), [torch.tensor([2, 1, 0])], factors, 1e-4).change(0, 2)["wide.weight"]
    first, _ = consumers(group, network, factors)
    seen = (network["wide"].weight.detach() + change)[:, [0, 1]]
    assert torch.allclose(seen.double(), compensated(first, [2], 1e-4)[:, [0, 1]], atol=1e-4)
    assert torch.equal(change[:, [2, 3]], torch.zeros(3, 2))  # its block lost nothing


@pytest.mark.parametrize(("edge", "evaluated", "calibrated"), [(9, 900, 256), (32, 900, 256), (64, 256, 64),
                                                              (224, 256, 64)])
def test_an_evaluation_has_fewer_images_where_they_are_large(edge, evaluated, calibrated):
    data = Images(torch.zeros(900, 1, 1, 1, dtype=torch.uint8).expand(900, 1, edge, edge), torch.zeros(900),
                  torch.zeros(1), torch.ones(1))
    assert len(affordable(data, 1024)) == evaluated and len(affordable(data, 256, 1 / 4)) == calibrated
    assert len(affordable(data, 2048, 2)) == min(900, 2 * evaluated)


def test_wide_and_narrow_layers_are_evaluated_alike(monkeypatch):
    """The one factor for all widths, and the solution for each, differ by how the ridge is taken only."""
    network, groups = zoo("resnet8"), zoo_groups("resnet8")
    _, factors = statistics_of("resnet8")
    spec = ZOO["resnet8"]
    data = [images(64, spec.in_channels, spec.image_size, spec.classes, seed=number) for number in (0, 1)]
    order = [torch.arange(group.channels) for group in groups]
    found = {}
    for solved in (10**6, 0):
        monkeypatch.setattr(refits, "SOLVED", solved)
        environment = PruningEnvironment(network, groups, order, factors, *data)
        found[solved] = logits(environment.repaired(groups.sizes - 3), data[1])
    plain = logits(PruningEnvironment(network, groups, order, {}, *data).repaired(groups.sizes - 3), data[1])
    off = (found[0] - found[10**6]).norm() / found[0].norm()
    assert off < 0.1 * (plain - found[0]).norm() / found[0].norm()


def test_consumers_without_factors_are_left_as_they_are():
    network, groups = seeded(Mixed), surgery.groups(seeded(Mixed), images(1).normalised(images(1).pixels))
    order = [torch.arange(group.channels) for group in groups]
    assert all(Refits(network, groups, order, {}, 1e-3).change(g, 1) == {} for g in range(len(groups)))

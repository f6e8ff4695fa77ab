"""Elimination of large groups by pools, beside the one by one that it must equal; and consumers made of parts."""


import numpy as np
import pytest
import torch
from torch import nn

from hobs_rspar.coupling import Group, Groups, Member
from hobs_rspar.curvature import hobs, pools
from hobs_rspar.curvature.consumers import centred, consumers
from hobs_rspar.curvature.elimination import Consumer, Elimination, one_by_one
from hobs_rspar.curvature.pools import by_pools, inverted
from hobs_rspar.errors import UserError
from small import statistics_of, zoo, zoo_groups


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def correlated(channels: int, area: int, outputs: int, number: int = 0, count: int | None = None) -> Consumer:
    """A consumer of channels that can replace each other in part: the spectrum falls like that of real inputs."""
    random, d = seed(number), channels * area
    mixing = torch.randn(d, d, generator=random, dtype=torch.float64) / (1 + torch.arange(d))[:, None] ** 0.7
    x = torch.randn(count or 3 * d, d, generator=random, dtype=torch.float64) @ mixing
    x = (x + 0.05 * torch.randn(x.shape, generator=random)) * (0.2 + torch.rand(d, generator=random))
    weight = torch.randn(outputs, channels, area, generator=random, dtype=torch.float64)
    fisher = torch.rand(outputs, generator=random, dtype=torch.float64) ** 3
    return Consumer(weight, x.T @ x / len(x), fisher, torch.randperm(channels, generator=random)[:, None])


def assert_equal(ours: Elimination, exact: Elimination) -> None:
    """The same order; costs and errors up to single precision."""
    assert ours.order.tolist() == exact.order.tolist()
    assert torch.allclose(ours.cost, exact.cost, rtol=1e-3, atol=1e-5 * float(exact.cost.max()))
    assert torch.allclose(ours.relative, exact.relative, rtol=1e-3)
    assert ours.cost.dtype == ours.relative.dtype == torch.float64


def assert_near(ours: Elimination, exact: Elimination) -> None:
    """Nearly the same order, and at every width hardly more error."""
    ranks = np.corrcoef(ours.order.argsort().numpy(), exact.order.argsort().numpy())
    assert ranks[0, 1] > 0.98
    assert (ours.relative <= 1.02 * exact.relative + 1e-6).all()
    assert (ours.cost.cumsum(0) <= 1.02 * exact.cost.cumsum(0) + 1e-6 * exact.cost.sum()).all()


@pytest.fixture
def small_pools(monkeypatch):
    """Pools of few channels, matrices that are halved and shrunk: as in a large group."""
    for name, value in {"COLUMNS": 12, "LEAST": 3, "HALVED": 16}.items():
        monkeypatch.setattr(pools, name, value)


# --- pools

@pytest.mark.parametrize("area", [1, 4])
@pytest.mark.parametrize("number", range(3))
def test_small_pools_give_almost_the_order_of_one_by_one(small_pools, area, number):
    parts = [correlated(40, area, 24, number), correlated(40, 1, 8, number + 10)]
    exact = one_by_one(parts, 1e-3)
    assert_near(by_pools(parts, 40, 1e-3), exact)
    assert exact.order.tolist() != sorted(exact.order.tolist())


@pytest.mark.parametrize("area", [1, 4])
def test_one_pool_that_holds_all_channels_is_one_by_one(area):
    parts = [correlated(40, area, 24), correlated(40, 1, 8, 1)]
    assert_equal(by_pools(parts, 40, 1e-3), one_by_one(parts, 1e-3))


def test_channels_that_do_not_depend_on_each_other_leave_in_order_of_their_cost(small_pools):
    """There no removal makes another channel cheaper, so that even small pools are exact."""
    part = correlated(40, 1, 24)
    part = Consumer(part.weight, part.covariance.diagonal().diag(), part.fisher, part.index)
    alone = 0.5 * part.fisher @ part.weight[:, :, 0].square() * part.covariance.diagonal()
    found = by_pools([part], 40, 1e-9)
    assert found.order.tolist() == alone[part.index[:, 0]].argsort().tolist()
    assert_equal(found, one_by_one([part], 1e-9))


@pytest.mark.parametrize("number", range(2))
def test_pools_in_their_own_size(number):
    parts = [correlated(60, 9, 32, number)]
    assert_equal(by_pools(parts, 60, 1e-3), one_by_one(parts, 1e-3))


def test_pools_on_real_covariances(monkeypatch):
    """A quarter of the channels of the largest groups in a pool."""
    monkeypatch.setattr(pools, "COLUMNS", 72)
    _, factors = statistics_of("resnet8")
    for group in list(zoo_groups("resnet8"))[:3]:
        parts = consumers(group, zoo("resnet8"), factors)
        assert_equal(by_pools(parts, group.channels, 1e-3), one_by_one(parts, 1e-3))


def test_fewer_images_than_columns(small_pools):
    """A covariance of low rank, which damping alone makes regular: channels depend on each other most."""
    parts = [correlated(40, 1, 16, count=24)]
    ours, exact = by_pools(parts, 40, 1e-3), one_by_one(parts, 1e-3)
    assert (ours.relative <= 1.05 * exact.relative).all()
    assert sorted(ours.order.tolist()) == list(range(40))


def test_a_pool_ends_where_a_channel_outside_is_cheaper(small_pools, monkeypatch):
    rounds = []
    leave = pools._leave
    monkeypatch.setattr(pools, "_leave", lambda *arguments: rounds.append(leave(*arguments)) or rounds[-1])
    found = by_pools([correlated(40, 1, 24)], 40, 1e-3)
    left = [len(part) for part, _ in rounds]
    assert sum(left) == 40 and min(left) >= 1 and max(left) <= 12
    assert min(left) < 12 and len(left) > 4  # rounds that ended before their pool was empty
    assert len(found.order.unique()) == 40


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_scale_of_inputs_changes_costs_alone(small_pools, scale):
    part = correlated(20, 2, 8)
    scaled = Consumer(part.weight, part.covariance * scale, part.fisher, part.index)
    plain, other = by_pools([part], 20, 1e-3), by_pools([scaled], 20, 1e-3)
    assert plain.order.tolist() == other.order.tolist()
    assert torch.allclose(other.cost / scale, plain.cost, rtol=1e-4)


def test_inputs_that_never_vary_cost_nothing():
    """A layer whose inputs are constant, beside another one: the other decides; alone, any order is right."""
    part = correlated(20, 2, 8)
    constant = Consumer(part.weight, torch.zeros_like(part.covariance), part.fisher, part.index)
    assert_equal(hobs.eliminate([part, constant], 1e-3), by_pools([part], 20, 1e-3))
    alone = hobs.eliminate([constant], 1e-3)
    assert sorted(alone.order.tolist()) == list(range(20))
    assert (alone.cost == 0).all() and (alone.relative == 0).all()


def indefinite(channels: int, area: int) -> Consumer:
    """A covariance with a negative eigenvalue larger than the damping: what large means leave in single precision."""
    part = correlated(channels, area, 8)
    values, vectors = torch.linalg.eigh(part.covariance)
    values[0] = -0.02 * part.covariance.diagonal().mean()
    return Consumer(part.weight, (vectors * values) @ vectors.T, part.fisher, part.index, source=("late", 0))


@pytest.mark.parametrize(("channels", "area"), [(20, 2), (200, 1)])
def test_a_covariance_that_rounding_left_indefinite_is_damped_more(channels, area):
    part = indefinite(channels, area)
    ours, more = hobs.eliminate([part], 1e-3), by_pools([part], channels, 0.1)
    assert torch.equal(ours.order, more.order) and torch.allclose(ours.cost, more.cost)
    assert (ours.cost > -1e-9).all()


def test_a_covariance_that_is_not_finite_is_refused():
    part = indefinite(6, 1)
    part.covariance[2, 3] = torch.inf
    with pytest.raises(UserError, match="late: the second moments of its inputs are not finite"):
        hobs.eliminate([part], 1e-3)


def test_ill_conditioned_covariances_stay_in_double_precision(small_pools):
    """Inputs that are nearly one: the largest eigenvalue is nearly their number."""
    part = correlated(40, 1, 16)
    common = torch.ones(40, 40, dtype=torch.float64) * 1e4
    part = Consumer(part.weight, part.covariance + common, part.fisher, part.index)
    assert pools._State(part, 40, 1e-7).inverse.dtype == torch.float64
    assert pools._State(correlated(40, 1, 16), 40, 1e-3).inverse.dtype == torch.float32
    assert_near(by_pools([part], 40, 1e-7), one_by_one([part], 1e-7))


def test_pools_leave_their_inputs_alone():
    part = correlated(30, 2, 8)
    before = part.weight.clone(), part.covariance.clone(), part.index.clone()
    first, second = by_pools([part], 30, 1e-3), by_pools([part], 30, 1e-3)
    assert torch.equal(first.order, second.order) and torch.equal(first.cost, second.cost)
    assert all(torch.equal(a, b) for a, b in zip(before, (part.weight, part.covariance, part.index)))


def test_inverse_by_halves(small_pools):
    covariance = correlated(25, 3, 1).covariance + 1e-3 * torch.eye(75)
    assert torch.allclose(inverted(covariance), torch.linalg.inv(covariance), rtol=1e-8)


def test_small_groups_go_one_by_one_and_large_ones_by_pools(monkeypatch):
    taken = []
    monkeypatch.setattr(hobs, "one_by_one", lambda *_: taken.append("one by one"))
    monkeypatch.setattr(hobs, "by_pools", lambda *_: taken.append("pools"))

    def sized(outputs: int, channels: int, area: int) -> Consumer:
        return Consumer(torch.ones(outputs, channels, area), torch.eye(channels * area), torch.ones(outputs),
                        torch.arange(channels)[:, None])

    for shape in ((64, 64, 9), (128, 128, 9), (64, 512, 1), (512, 512, 1)):
        hobs.eliminate([sized(*shape)], 1e-3)
    hobs.eliminate([sized(64, 64, 9), sized(64, 64, 9), sized(10, 64, 1)], 1e-3)  # the largest of the CIFAR ResNets
    assert taken == ["one by one", "pools", "one by one", "pools", "one by one"]


def test_the_number_of_threads_is_left_as_it_was(small_pools):
    before = torch.get_num_threads()
    by_pools([correlated(20, 2, 8)], 20, 1e-3)
    assert torch.get_num_threads() == before


# --- consumers in parts

def test_parts_that_read_some_channels_are_one_consumer_with_a_block_diagonal_covariance():
    """A very wide layer in blocks, beside another consumer that reads every channel."""
    first, second, common = correlated(7, 3, 10), correlated(5, 3, 10, 1), correlated(12, 1, 4, 2)
    parts = [Consumer(part.weight, part.covariance, first.fisher, torch.arange(size)[:, None], torch.tensor(channels))
             for part, size, channels in ((first, 7, [0, 2, 3, 5, 8, 9, 11]), (second, 5, [1, 4, 6, 7, 10]))]
    order = torch.cat([part.channels for part in parts]).argsort()
    index = torch.arange(12)[order][:, None]  # of each channel in the two blocks side by side
    whole = Consumer(torch.cat([part.weight for part in parts], 1),
                     torch.block_diag(*[part.covariance for part in parts]), first.fisher, index)
    damping = 1e-9  # damping is relative to each block's own mean
    assert_near(by_pools([*parts, common], 12, damping), one_by_one([whole, common], damping))
    assert_near(hobs.eliminate(parts, damping), one_by_one([whole], damping))


def grouped() -> tuple[nn.Conv2d, Group, dict]:
    """A grouped convolution and a linear layer that both read the same 4 channels, and factors of both."""
    network = nn.ModuleDict({"conv": nn.Conv2d(8, 6, 3, groups=2), "out": nn.Linear(4, 3)})
    random = seed(3)
    rows = torch.cat([torch.randn(2, 90, 36, generator=random), torch.ones(2, 90, 1)], 2)
    flat = torch.cat([torch.randn(50, 4, generator=random), torch.ones(50, 1)], 1)
    factors = {"conv/a": rows.mT @ rows / 90, "out/a": (flat.T @ flat / 50)[None],
               "conv/fisher": torch.rand(6, generator=random), "out/fisher": torch.rand(3, generator=random)}
    members = (Member("conv", "consumer", tuple((i, 4 + i) for i in range(4))),
               Member("out", "consumer", tuple((i,) for i in (2, 0, 3, 1))))
    return network, Group("before", 4, members), factors


def test_every_group_of_a_convolution_is_a_consumer():
    network, group, factors = grouped()
    first, second, linear = consumers(group, network, factors)
    for i, part in enumerate((first, second)):
        assert torch.equal(part.weight, network["conv"].weight[3 * i:3 * i + 3].detach().double().flatten(2))
        assert torch.equal(part.covariance, centred(factors["conv/a"][i].double()))
        assert torch.equal(part.fisher, factors["conv/fisher"][3 * i:3 * i + 3].double())
        assert part.index.tolist() == [[0], [1], [2], [3]] and part.source == ("conv", i)
    assert linear.index.flatten().tolist() == [2, 0, 3, 1] and linear.source == ("out", 0)
    exact = one_by_one([first, second, linear], 1e-3)
    assert_equal(by_pools([first, second, linear], 4, 1e-3), exact)


def test_blocks_of_a_wide_layer_have_their_own_channels():
    """Channels of two columns each; one block is not full, one has a column that belongs to no channel of the group."""
    network, random = nn.ModuleDict({"wide": nn.Linear(11, 3)}), seed(5)
    columns = torch.tensor([[0, 1, 6, 7, 10], [2, 3, 8, 9, -1], [4, 5, -1, -1, -1]])
    a = torch.zeros(3, 6, 6)
    for block, part in zip(a, columns):
        places = [*range(int((part >= 0).sum())), 5]
        rows = torch.randn(40, len(places), generator=random)
        rows[:, -1] = 1
        block[np.ix_(places, places)] = rows.T @ rows
    factors = {"wide/a": a, "wide/columns": columns, "wide/g": torch.eye(3)[None]}
    group = Group("before", 4, (Member("wide", "consumer", ((8, 9), (0, 1), (6, 7), (2, 3))),))
    first, second = consumers(group, network, factors)  # the third block has none of the group's channels
    assert first.channels.tolist() == [1, 2] and first.index.tolist() == [[0, 1], [2, 3]]
    assert second.channels.tolist() == [0, 3] and second.index.tolist() == [[2, 3], [0, 1]]
    assert torch.equal(first.weight[..., 0], network["wide"].weight[:, columns[0]].detach().double())
    assert torch.equal(second.covariance, centred(a[1][[0, 1, 2, 3, 5]][:, [0, 1, 2, 3, 5]].double()))
    analysis = hobs.analyse(network, Groups([group], {"wide": (33, 3, 11)}), factors, 1e-3)
    assert sorted(analysis.eliminations[0].order.tolist()) == [0, 1, 2, 3]
    w = first.weight[:, :, 0]
    wanted = 0.5 * torch.stack([torch.trace(w[:, own] @ first.covariance[own][:, own] @ w[:, own].T)
                                for own in ([0, 1], [2, 3])])
    assert torch.allclose(analysis.scores["kfac"][0][[1, 2]], wanted)


# --- groups without factors

def test_a_group_whose_consumers_have_no_factors_takes_other_scores():
    network, group, factors = grouped()
    alone = Group("odd", 3, (Member("up", "consumer", ((0,), (1,), (2,))),))
    kept = Group("kept", 2, (), "as asked")
    every = Groups([group, alone, kept], {"conv": (1, 6, 8), "out": (1, 3, 4), "up": (1, 3, 3)},
                   opaque={"up": "a transposed convolution"})
    scores = [torch.zeros(4), torch.tensor([3.0, 1.0, 2.0]), torch.zeros(2)]
    found = hobs.analyse(network, every, factors, 1e-3, lambda: scores)
    assert found.eliminations[1].order.tolist() == [1, 2, 0]
    assert found.eliminations[1].cost.tolist() == [1, 2, 3]
    assert found.eliminations[1].relative.tolist() == pytest.approx([1 / 6, 3 / 6, 1])
    assert found.scores["hobs"][1].tolist() == [6, 1, 3]
    assert found.scores["kfac"] == []  # the whole of G is not there
    assert found.eliminations[2].order.tolist() == [0, 1] and not found.eliminations[2].cost.any()
    with pytest.raises(UserError, match=r"group odd: none of its consumers \(up\) can be scored.*protect 'odd'"):
        hobs.analyse(network, every, factors, 1e-3)
    called = []
    hobs.analyse(network, Groups([group, kept], every.layers), factors, 1e-3, lambda: called.append(1))
    assert not called


def test_kfac_scores_of_parts_are_those_of_the_grouped_convolution():
    """Closing a gate of a grouped convolution: the sum over its groups, each with its own A and G."""
    network, group, factors = grouped()
    g = torch.randn(2, 3, 3, generator=seed(8))
    factors = {name: value for name, value in factors.items() if not name.endswith("fisher")} | {
        "conv/g": g @ g.mT, "out/g": torch.eye(3)[None]}
    (seen,) = hobs.analyse(network, Groups([group], {}), factors, 1e-3).scores["kfac"]
    for channel in range(4):
        total = 0.0
        for i in range(2):
            a = centred(factors["conv/a"][i].double())[channel * 9:channel * 9 + 9, channel * 9:channel * 9 + 9]
            w = network["conv"].weight[3 * i:3 * i + 3, channel].detach().double().flatten(1)
            total += 0.5 * torch.trace(factors["conv/g"][i].double() @ w @ a @ w.T)
        own = [2, 0, 3, 1][channel]
        w = network["out"].weight[:, own].detach().double()
        total += 0.5 * w @ w * centred(factors["out/a"][0].double())[own, own]
        assert float(seen[channel]) == pytest.approx(float(total))

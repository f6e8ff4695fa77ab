"""Budgets, thresholds, PPO, the penalty and the environment, against hand computation and brute force."""

import copy
import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hobs_rspar import cost, slicing, surgery
from hobs_rspar.allocation.environment import PruningEnvironment
from hobs_rspar.allocation.expense import Macs, Milliseconds, limited
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.ppo import RSPARAgent
from hobs_rspar.allocation.space import Space, floors, moves
from hobs_rspar.allocation.threshold import threshold_widths
from hobs_rspar.coupling import Group, Groups, Member
from hobs_rspar.curvature.hobs import analyse, centred, collect_factors
from hobs_rspar.curvature.repair import reestimate_batchnorm
from hobs_rspar.errors import UserError
from hobs_rspar.hardware.latency_table import LatencyTable, Layer, Whole
from hobs_rspar.methods import _registry
from hobs_rspar.training import accuracy, logits
from small import IMAGES, ZOO, Stream, assert_same, context, images, seeded, snapshot, trained, zoo, zoo_groups


def kept(groups: Groups, widths: np.ndarray) -> float:
    return float(groups.macs(np.asarray(widths))) / groups.dense_macs


def chain(*channels: int, protected: str = "") -> Groups:
    """Groups of a chain of 1x1 convolutions on one pixel: inputs 1, outputs 1, so MACs are products of neighbours."""
    names = [f"conv{i}" for i in range(len(channels) + 1)]
    widths = [1, *channels, 1]
    layers = {name: (a * b, b, a) for name, a, b in zip(names, widths, widths[1:])}
    groups = []
    for i, count in enumerate(channels):
        index = tuple((c,) for c in range(count))
        members = (Member(names[i], "producer", index), Member(names[i + 1], "consumer", index))
        groups.append(Group(names[i], count, members, "as asked" if names[i] == protected else ""))
    return Groups(groups, layers)


# --- budgets

@pytest.mark.parametrize("name", [name for name in ZOO if name != "resnet20"])
def test_budgets_are_met_from_any_ratios(name):
    groups, random = zoo_groups(name), np.random.default_rng(0)
    low = floors(groups, 0.1)
    for _ in range(12):
        budget, ratios = random.uniform(0.1, 1), random.uniform(0.01, 1, len(groups))
        widths = Space(groups, budget, 0.1).project(ratios[None])[0]
        assert abs(kept(groups, widths) - budget) <= 0.01 * budget
        assert (widths >= low).all() and (widths <= groups.sizes).all() and widths.dtype.kind == "i"


def test_uniform_widths_are_uniform_up_to_single_channels():
    groups = zoo_groups("resnet20")
    for budget in (0.1, 0.26, 0.5, 0.9):
        widths = Space(groups, budget).uniform
        ratios = widths / groups.sizes
        middle = np.median(ratios)
        assert (np.abs(widths - middle * groups.sizes) <= 1.5).all()
        assert abs(kept(groups, widths) - budget) <= 0.01 * budget
    assert (Space(groups, 1.0).uniform == groups.sizes).all()


def test_projection_keeps_the_proportions():
    groups = zoo_groups("resnet20")
    ratios = np.linspace(0.2, 0.9, len(groups))
    widths = Space(groups, 0.3, 0.01).project(ratios[None])[0]
    scaled = Space(groups, 0.3, 0.01).project(0.37 * ratios[None])[0]
    assert (widths == scaled).all()
    scale = (widths / groups.sizes / ratios)
    assert (np.abs(scale - np.median(scale)) * ratios * groups.sizes <= 1.5).all()


def test_floors_and_protected_groups_are_respected():
    groups = surgery.groups(context("resnet8", "l1").network, ZOO["resnet8"].example(), ["layer1.0.conv1"])
    low = floors(groups, 0.35)
    assert low.tolist() == [6, 16, 12, 12, 23, 23]  # ceilings, and all of the protected group
    ratios = np.array([1, 0.01, 0.01, 0.01, 1, 1])
    widths = Space(groups, 0.45, 0.35).project(ratios[None])[0]
    assert (widths >= low).all() and widths[1] == 16 and widths[2] == 12
    assert abs(kept(groups, widths) - 0.45) <= 0.0045
    assert floors(groups, 1e-9).tolist() == [1, 16, 1, 1, 1, 1]


def test_impossible_budgets_are_refused():
    groups = zoo_groups("resnet8")
    with pytest.raises(UserError, match="budget 0.05x MACs cannot be met: with every group at its floor .*; raise"):
        Space(groups, 0.05, 0.5).project(np.ones((1, 6)))
    with pytest.raises(UserError, match="nearest widths keep 0.5000x .group conv0 is the coarsest.; change the budget"):
        assert Space(chain(2), 0.7).uniform


def test_completion_takes_the_nearest_widths():
    """One channel away from the budget, and the cheapest way there is one channel of the right group."""
    groups = chain(100, 100)
    wanted = np.array([50.0, 50.0])
    target = kept(groups, np.array([50, 51]))
    widths = Space(groups, target, tolerance=1e-9).complete(wanted[None])[0]
    assert sorted(widths.tolist()) == [50, 51]
    assert (Space(groups, target, tolerance=0.05).complete(wanted[None]) == 50).all()  # met as it is


def test_small_networks_meet_every_budget_that_can_be_met():
    groups = surgery.groups(seeded(Stream), IMAGES[:1])
    every = np.array(list(itertools.product(*(range(1, size + 1) for size in groups.sizes))))
    ratios = groups.macs(every) / groups.dense_macs
    for budget in np.arange(0.1, 1, 0.02):
        if (np.abs(ratios - budget) <= 0.01 * budget).any():
            assert abs(kept(groups, Space(groups, budget).uniform) - budget) <= 0.01 * budget


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_many_projections_are_the_single_ones(name):
    groups, random = zoo_groups(name), np.random.default_rng(1)
    ratios = random.uniform(0.01, 1, (20, len(groups)))
    together = Space(groups, 0.3, 0.1).project(ratios)
    assert (np.abs(groups.macs(together) / groups.dense_macs - 0.3) <= 0.003).all()
    assert (together == [Space(groups, 0.3, 0.1).project(row[None])[0] for row in ratios]).all()


def test_rows_without_a_single_step_are_completed_among_the_others():
    """In a small network some rows need the look at everything; their neighbours in the batch do not notice."""
    groups = surgery.groups(seeded(Stream), IMAGES[:1])
    ratios = np.random.default_rng(2).uniform(0.01, 1, (200, len(groups)))
    together = Space(groups, 0.31, 0.0, 0.002).project(ratios)
    assert (np.abs(groups.macs(together) / groups.dense_macs - 0.31) <= 0.002 * 0.31).all()
    assert (together == [Space(groups, 0.31, 0.0, 0.002).project(row[None])[0] for row in ratios]).all()


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "vgg16_bn_cifar"])
def test_macs_after_moves_are_those_of_the_moved_widths(name):
    groups, random = zoo_groups(name), np.random.default_rng(3)
    widths = np.stack([random.integers(2, size, 5) for size in groups.sizes], 1)
    changes = moves(len(groups))[0][::7]
    assert (groups.macs_after(widths, changes) == groups.macs(widths[:, None] + changes)).all()


def test_a_change_from_which_no_step_leads_back_is_dropped(monkeypatch):
    """That row alone: the others are changed and meet the budget."""
    space, whole = Space(zoo_groups("resnet8"), 0.26, 0.1), Space.complete
    widths = np.repeat(space.uniform[None], 6, 0)
    free = space.disturbed(widths, 3, np.random.default_rng(0))
    stuck = free[2]

    def complete(self, wanted):
        done = whole(self, wanted)
        if (done == stuck).all(1).any():
            raise UserError("no widths come within the tolerance")
        return done
    monkeypatch.setattr(Space, "complete", complete)
    found = space.disturbed(widths, 3, np.random.default_rng(0))
    dropped = (free == stuck).all(1)
    assert dropped[2] and not dropped.all() and (free[2] != widths[0]).any()
    assert (found[dropped] == widths[0]).all() and (found[~dropped] == free[~dropped]).all()


def test_threshold_on_a_known_ranking():
    groups = chain(10, 10, 10)
    scores = [torch.arange(10) + 100.0, torch.arange(10) + 0.0, torch.arange(10) + 50.0]
    target = kept(groups, np.array([10, 1, 7]))  # nine of the second group go first, then three of the third
    widths = threshold_widths(Space(groups, target), scores)
    assert widths.tolist() == [10, 1, 7]
    low = threshold_widths(Space(groups, kept(groups, np.array([10, 4, 4])), 0.4), scores)
    assert low.tolist() == [10, 4, 4]
    shielded = chain(10, 10, 10, protected="conv1")
    whole = threshold_widths(Space(shielded, kept(groups, np.array([10, 10, 3]))), scores)
    assert whole.tolist() == [10, 10, 3]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_threshold_meets_its_budget_on_any_ranking(name):
    groups = zoo_groups(name)
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        scores = [torch.rand(int(size), generator=random) * 10 ** float(torch.rand(1, generator=random))
                  for size in groups.sizes]
        budget = 0.15 + 0.1 * seed
        assert abs(kept(groups, threshold_widths(Space(groups, budget, 0.1), scores)) - budget) <= 0.01 * budget
    with pytest.raises(UserError, match="cannot be met"):
        threshold_widths(Space(groups, 0.05, 0.9), scores)


# --- latency as the budget

def timed(groups: Groups, rate: float = 0.0) -> LatencyTable:
    """2 ms, 1 ms for every 1,000 of a layer's inputs x outputs, and ``rate`` ms for an element."""
    layers = {}
    for name, (_, outs, ins) in groups.layers.items():
        grid = tuple(tuple(i * o / 1000 for o in (1, outs)) for i in (1, ins))
        layers[name] = Layer((1, ins), (1, outs), grid, 7)
    random, wholes = np.random.default_rng(0), []
    for ins, outs in zip(*groups.layer_widths(np.stack([random.integers(1, groups.sizes + 1) for _ in range(8)]))):
        ms = 2 + float(ins @ outs) / 1000 + rate * 7 * float(outs.sum())
        wholes.append(Whole(tuple(ins.tolist()), tuple(outs.tolist()), ms))
    return LatencyTable(layers, 64, "cpu_a", tuple(wholes))


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn_cifar"])
def test_a_latency_is_what_the_table_says_of_the_pruned_network(name):
    groups, random = zoo_groups(name), np.random.default_rng(0)
    expense = Milliseconds(groups, timed(groups, 0.01))
    widths = np.stack([random.integers(2, groups.sizes) for _ in range(4)])
    for row, ms in zip(widths, expense.of(widths)):
        state = groups.sliced(zoo(name).state_dict(), [range(int(width)) for width in row])
        shapes = [state[f"{layer}.weight"].shape for layer in groups.layers]
        assert ms == pytest.approx(2 + sum(s[0] * s[1] / 1000 + 0.07 * s[0] for s in shapes))
    changes = moves(len(groups))[0][::9]
    none = 0 * groups.sizes  # widths that no network has count as the nearest ones
    assert expense.of(groups.sizes + 3) == expense.dense and expense.of(none) == expense.of(none + 1)
    after = expense.after(widths, changes)
    assert after.shape == (4, len(changes)) and after[2, 5] == pytest.approx(expense.of(widths[2] + changes[5]))


@pytest.mark.parametrize("budget", [{"latency_ratio": 0.5}, {"latency_ms": 8.0}])
def test_a_latency_budget_is_met(budget):
    groups = zoo_groups("resnet20")
    table = timed(groups)
    given = {"macs": None, "latency_ms": None, "latency_ratio": None} | budget
    kept_share, expense = limited(groups, given, table.to_json())
    assert kept_share * expense.dense == pytest.approx(budget.get("latency_ms", 0.5 * expense.dense))
    space = Space(groups, kept_share, 0.1, expense=expense)
    ratios = np.random.default_rng(1).uniform(0.2, 1, (8, len(groups)))
    for widths in (space.project(ratios), space.uniform[None], space.disturbed(space.project(ratios), 3,
                                                                               np.random.default_rng(2))):
        assert (np.abs(space.spent(widths) - kept_share) <= 0.01 * kept_share).all() and space.meets(widths).all()
    scores = [torch.rand(int(size), generator=torch.Generator().manual_seed(0)) for size in groups.sizes]
    assert space.meets(threshold_widths(space, scores)[None]).all()


@pytest.mark.parametrize("method", ["hobs_rspar", "hobs_rspar_ppo", "l2_global", "jtp"])
def test_methods_that_choose_widths_meet_a_latency_budget(method):
    where = context("resnet8", method, budget=0.6)
    where.space = replace(where.space, expense=Milliseconds(where.groups, timed(where.groups)))
    module = _registry.method(method)
    quick = {"images": 1000, "iterations": 2, "episodes": 8} if method.startswith("hobs") else {}
    quick = {"images": 64, "batch_size": 32, "rounds": 2, "held_out": 64, "hidden": 8} if method == "jtp" else quick
    plan = module.plan(where, module.Options(**quick))
    widths = np.array([len(kept) for kept in plan.kept])
    assert where.space.meets(widths[None]).all() and len(set((widths / where.groups.sizes).round(2))) > 1


def test_a_latency_budget_needs_this_networks_table():
    groups, asked = zoo_groups("resnet20"), {"macs": None, "latency_ms": None, "latency_ratio": 0.5}
    with pytest.raises(UserError, match="latency.json: nothing was measured"):
        limited(groups, asked, {"measured": False})
    with pytest.raises(UserError, match="latency.json is another network's: its layers differ"):
        limited(groups, asked, timed(zoo_groups("resnet8")).to_json())
    kept_share, expense = limited(groups, {"macs": 0.3, "latency_ms": None, "latency_ratio": None}, {"measured": False})
    assert kept_share == 0.3 and isinstance(expense, Macs)


# --- penalty

def test_penalty_as_printed_and_corrected():
    printed, corrected = AdaptivePenalty(), AdaptivePenalty(sign=1)
    assert printed.weight(0.93, 0.83) == pytest.approx(0.01 * math.exp(-0.25))
    assert corrected.weight(0.93, 0.83) == pytest.approx(0.01 * math.exp(0.25))
    assert printed.weight(0.5, 0.5) == corrected.weight(0.5, 0.5) == 0.01
    assert printed.weight(0.9, 0.1) < printed.weight(0.9, 0.8) < corrected.weight(0.9, 0.8) < corrected.weight(0.9, 0.1)


def test_penalty_stays_in_its_range():
    steep = AdaptivePenalty(0.01, 10, 1, 1e-3, 0.05)
    assert steep.weight(0.9, 0.1) == 0.05 and steep.weight(0.1, 0.9) == 1e-3
    assert AdaptivePenalty().weight(93, 61) == 1e-4  # percentage points would sit on the bound


@pytest.mark.parametrize("sign", [-1, 1])
def test_penalties_of_many_accuracies_are_the_single_ones(sign):
    penalty, accuracies = AdaptivePenalty(0.01, 10, sign, 1e-3, 0.05), np.linspace(0.1, 0.95, 20)
    assert penalty.weight(0.9, accuracies).tolist() == [penalty.weight(0.9, one) for one in accuracies.tolist()]


# --- PPO

def agent(**changes) -> RSPARAgent:
    return RSPARAgent(**{"num_layers": 3, "hidden_dim": 16, "seed": 1} | changes)


def test_log_prob_is_the_density_before_the_sigmoid():
    ours, state = agent(initial_ratio=0.3), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    action, log_prob = ours.select_action(state)
    assert action.shape == log_prob.shape == (5,) and ((action > 0) & (action < 1)).all()
    mean = ours.policy.actor(state)[:, 0].detach()
    raw = torch.logit(action) - math.log(0.3 / 0.7)
    std = ours.policy.log_std.exp().item()
    wanted = -0.5 * ((raw - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(log_prob, wanted, atol=1e-4)
    sure, _ = ours.select_action(state, deterministic=True)
    assert torch.allclose(sure, torch.sigmoid(mean + math.log(0.3 / 0.7)))
    assert torch.allclose(sure, torch.full((5,), 0.3), atol=0.02)  # the untrained policy is centred there


def test_one_state_gives_one_action():
    ours = agent()
    action, log_prob = ours.select_action(torch.zeros(7))
    assert action.shape == log_prob.shape == () and 0 < action < 1
    assert ours.select_action([0.0] * 7, deterministic=True)[0] == pytest.approx(0.5, abs=0.02)


def test_the_default_state_is_three_features_all_ratios_and_the_drop():
    assert RSPARAgent(12).state_dim == 3 + 12 + 1
    with pytest.raises(UserError, match="the state has 4 values, expected 7"):
        agent().select_action(torch.zeros(4))


def test_advantages_by_hand():
    ours = agent(gamma=0.9, gae_lambda=0.8)
    rewards = torch.tensor([[[0.0, 1.0], [0.5, 0.0], [2.0, -1.0]]])  # one round of two parallel episodes
    values = torch.tensor([[[1.0, 0.2], [0.3, 0.4], [0.7, -0.5]]])
    for episode in range(2):
        r, v = rewards[0, :, episode].tolist(), values[0, :, episode].tolist()
        delta = [r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]]
        wanted = [delta[0] + 0.72 * delta[1] + 0.72**2 * delta[2], delta[1] + 0.72 * delta[2], delta[2]]
        assert ours._advantages(rewards, values)[0, :, episode].tolist() == pytest.approx(wanted, rel=1e-5)


def episode(ours: RSPARAgent, rewards, count: int = 4) -> None:
    for step in range(3):
        ours.select_action(torch.randn(count, 7, generator=torch.Generator().manual_seed(step)))
        ours.observe(rewards[step])


def normalised_advantages(ours: RSPARAgent) -> torch.Tensor:
    rewards, values = (torch.stack(part)[None] for part in (ours.rollout.rewards, ours.rollout.values))
    found = ours._advantages(rewards, values).flatten()
    return (found - found.mean()) / found.std(correction=0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_the_ratio_is_clipped(factor):
    ours = agent(entropy=0.0)
    episode(ours, torch.randn(3, 4, generator=torch.Generator().manual_seed(9)))
    advantages = normalised_advantages(ours)
    ours.rollout.log_probs = [part - math.log(factor) for part in ours.rollout.log_probs]  # now pi/pi_old = factor
    losses = ours.update_policy(batch_size=100, epochs=1)
    clipped = min(max(factor, 0.8), 1.2)
    wanted = -torch.minimum(factor * advantages, clipped * advantages).mean()
    assert losses["policy_loss"] == pytest.approx(wanted.item(), abs=1e-5)


def test_beyond_the_clip_the_actor_stays():
    """Where the ratio is 2 and every advantage positive, nothing pulls at the actor; the critic still learns."""
    ours = agent(entropy=0.0, lr=0.01)
    states, actions = torch.randn(8, 7), torch.randn(8)
    old = ours.policy(states)[0].log_prob(actions).detach() - math.log(2)
    before = copy.deepcopy(ours.policy.state_dict())
    ours._step(states, actions, old, torch.ones(8), torch.ones(8))
    same = {name: torch.equal(tensor, before[name]) for name, tensor in ours.policy.state_dict().items()}
    assert all(same[name] for name in same if not name.startswith("critic"))
    assert not any(same[name] for name in same if name.startswith("critic"))
    ours._step(states, actions, old, -torch.ones(8), torch.ones(8))  # a negative advantage is not clipped there
    assert not torch.equal(ours.policy.log_std, before["log_std"])


def test_losses_of_an_update_by_hand():
    ours = agent(entropy=0.02, gamma=1.0, gae_lambda=1.0)
    episode(ours, torch.tensor([[0.0] * 4, [0.0] * 4, [1.0, 2.0, 3.0, 4.0]]))
    values = torch.stack(ours.rollout.values)
    returns = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(3, 4)  # undiscounted: the episode's reward, at every step
    losses = ours.update_policy(batch_size=12, epochs=1)
    assert losses["value_loss"] == pytest.approx((values - returns).square().mean().item(), rel=1e-5)
    assert losses["entropy"] == pytest.approx(0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.5), rel=1e-5)
    assert losses["policy_loss"] == pytest.approx(0, abs=1e-5)  # ratios are 1, advantages have mean 0
    assert ours.rollout.actions == [] and ours.rollout.rewards == []


def test_single_and_parallel_episodes_are_the_same_update():
    states = torch.randn(3, 1, 7, generator=torch.Generator().manual_seed(0))
    agents = [agent(), agent()]
    for step in range(3):
        agents[0].select_action(states[step, 0])
        agents[0].observe(float(step))
        agents[1].select_action(states[step])
        agents[1].observe(torch.tensor([float(step)]))
    for ours in agents:
        ours.update_policy(batch_size=2, epochs=3)
    for a, b in zip(*(ours.policy.parameters() for ours in agents)):
        assert torch.allclose(a, b, atol=1e-6)


def test_incomplete_episodes_are_refused():
    ours = agent()
    with pytest.raises(UserError, match="complete episodes of 3 steps.*recorded: 0 actions, 0 rewards"):
        ours.update_policy()
    ours.select_action(torch.zeros(1, 7))
    ours.observe(torch.ones(1))
    with pytest.raises(UserError, match="recorded: 1 actions, 1 rewards"):
        ours.update_policy()


def solve(seed: int, updates: int) -> tuple[float, float, float]:
    """A problem with a known optimum: three groups, each with its own best ratio among five."""
    best = np.array([0.9, 0.1, 0.5])
    ours = RSPARAgent(3, hidden_dim=32, lr=5e-3, gamma=1.0, seed=seed, entropy=0.0)
    features = torch.eye(3)

    def reward(ratios: torch.Tensor) -> torch.Tensor:
        nearest = (ratios * 4).round() / 4  # five widths a group
        return -(nearest - torch.tensor(best, dtype=torch.float32)).square().sum(1)

    def walk(episodes: int, deterministic: bool = False) -> torch.Tensor:
        ratios = torch.zeros(episodes, 3)
        for step in range(3):
            state = torch.cat([features[step].expand(episodes, -1), ratios, torch.zeros(episodes, 1)], 1)
            ratios[:, step] = ours.select_action(state, deterministic)[0]
            if not deterministic:
                ours.observe(reward(ratios) if step == 2 else torch.zeros(episodes))
        return reward(ratios)

    before = walk(1, deterministic=True).item()
    for _ in range(updates):
        walk(32)
        ours.update_policy(batch_size=48, epochs=6)
    levels = torch.linspace(0, 1, 5)
    optimum = reward(torch.tensor(list(itertools.product(levels, levels, levels)))).max().item()
    return before, walk(1, deterministic=True).item(), optimum


def test_updates_find_the_optimum_of_a_known_problem():
    before, after, optimum = solve(seed=0, updates=40)
    assert before < optimum - 0.2
    assert after == pytest.approx(optimum, abs=1e-6)
    assert solve(seed=0, updates=2) == solve(seed=0, updates=2)


# --- environment

@pytest.fixture(scope="module")
def small():
    """A trained network, its groups, elimination orders, factors and images."""
    network, train = trained(seeded(Stream), images(512), epochs=2), images(512)
    reestimate_batchnorm(network, train)
    groups = surgery.groups(network, IMAGES[:1])
    options = SimpleNamespace(batch_size=64, positions=None, damping=1e-3)
    factors = collect_factors(network, train.first(128), options, torch.Generator().manual_seed(0))
    found = analyse(network, groups, factors, 1e-3)
    return SimpleNamespace(network=network, groups=groups, factors=factors, order=[e.order for e in found.eliminations],
                           relative=[e.relative for e in found.eliminations], calibration=train.first(128),
                           validation=images(200, seed=2, wrong=0.1))


def environment(small) -> PruningEnvironment:
    return PruningEnvironment(small.network, small.groups, small.order, small.factors, small.calibration,
                              small.validation)


WIDTHS = np.array([10, 20])


def test_an_allocation_is_evaluated_once(small):
    before = snapshot(small.network)
    ours = environment(small)
    assert ours.images == 200 and ours.evaluations == 0
    first = ours.evaluate(WIDTHS)
    assert ours.images == 200 + 128 + 200 and ours.evaluations == 1
    assert ours.evaluate(WIDTHS.astype(float)) is first and ours.images == 528 and ours.evaluations == 1
    ours.evaluate(WIDTHS + 1)
    assert ours.evaluations == 2
    assert_same(before, snapshot(small.network))


def test_the_reward_is_that_of_the_repaired_network(small, monkeypatch):
    """In fp32, where folding batch norms changes nothing but the last bits."""
    monkeypatch.setattr(PruningEnvironment, "PRECISION", "fp32")
    ours = environment(small)
    network = ours.repaired(WIDTHS)
    out = logits(network, small.validation, ours.PRECISION, ours.batch)
    seen = ours.evaluate(WIDTHS)
    assert seen.accuracy == pytest.approx(accuracy(out, small.validation.labels) / 100)
    assert seen.loss == pytest.approx(F.cross_entropy(out, small.validation.labels).item(), rel=1e-5)
    dense = logits(small.network, small.validation, ours.PRECISION, ours.batch)
    assert ours.dense.accuracy == pytest.approx(accuracy(dense, small.validation.labels) / 100)
    assert seen.loss > ours.dense.loss > 0
    other = images(50, seed=8)
    assert ours.loss_on(WIDTHS, other) == pytest.approx(
        F.cross_entropy(logits(network, other, ours.PRECISION, ours.batch), other.labels).item(), rel=1e-5)


def test_kept_channels_are_the_last_of_the_order(small):
    ours = environment(small)
    for channels, order, width in zip(ours.kept(WIDTHS), small.order, WIDTHS):
        assert channels == sorted(order.tolist()[-width:]) and len(channels) == width
    assert [len(channels) for channels in ours.kept(small.groups.sizes)] == small.groups.sizes.tolist()


def test_the_pruned_network_is_refitted_from_the_covariances(small):
    ours = environment(small)
    pruned = ours.pruned(WIDTHS)
    assert cost.count(pruned, IMAGES[:1]).macs == small.groups.macs(WIDTHS)
    alive = ours.kept(WIDTHS)
    # the consumer of the last group, solved by hand: a ridge regression on the remaining, centred inputs
    covariance = centred(small.factors["out/a"][0].double())
    rows = alive[1]
    level = PruningEnvironment.RIDGE * covariance[rows][:, rows].diagonal().mean()
    gram = covariance[rows][:, rows] + level * torch.eye(len(rows), dtype=torch.float64)
    wanted = torch.linalg.solve(gram, covariance[rows] @ small.network.out.weight.detach().double().T).T
    assert torch.allclose(pruned.out.weight.detach().double(), wanted, atol=1e-4)
    assert torch.equal(pruned.stem.weight, small.network.stem.weight[alive[0]])
    whole = ours.pruned(small.groups.sizes)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), small.network.state_dict().values()))


def test_without_refit_the_weights_stay(small):
    ours = PruningEnvironment(small.network, small.groups, small.order, small.factors, small.calibration,
                              small.validation, refit=False)
    pruned, alive = ours.pruned(WIDTHS), ours.kept(WIDTHS)
    assert torch.equal(pruned.out.weight, small.network.out.weight[:, alive[1]])
    assert ours.evaluate(WIDTHS).loss > environment(small).evaluate(WIDTHS).loss


def test_refit_and_statistics_help(small):
    ours = environment(small)
    plain = slicing.sliced(small.network, small.groups, ours.kept(WIDTHS))
    cut = F.cross_entropy(logits(plain, small.validation), small.validation.labels).item()
    reestimate_batchnorm(plain, small.calibration)
    normed = F.cross_entropy(logits(plain, small.validation), small.validation.labels).item()
    assert ours.evaluate(WIDTHS).loss < normed < cut

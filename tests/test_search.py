"""Searches for allocations, against the optimum found by looking at everything."""

from importlib import import_module

import numpy as np
import pytest
import torch

from hobs_rspar.allocation import dynamic
from hobs_rspar.allocation.reward import SeparableReward
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import PATIENCE, Spent, Trial, run
from hobs_rspar.allocation.walk import RewardedWalk, Walk
from small import zoo_groups
from test_allocation import chain

# How much of the way from the mean of all allocations to the best one may be missing after 400 evaluations.
MISSING = {"random_search": 0.2, "annealing": 0.05, "greedy": 0.15, "local_search": 0.1, "dynamic": 0.02, "cmaes": 0.05,
           "ppo_search": 0.15, "dqn": 0.15, "sac": 0.15}
SPACE = Space(chain(16, 16, 16, 16), 0.35, 0.1, 0.02)


class Recorded:
    """A reward that remembers what it was asked."""

    def __init__(self, reward):
        self.reward, self.asked = reward, []

    def score(self, widths: np.ndarray) -> np.ndarray:
        self.asked += [tuple(row) for row in widths.tolist()]
        return self.reward.score(widths)


class Coupled:
    """Errors that multiply: narrow neighbours hurt more together than apart."""

    def score(self, widths: np.ndarray) -> np.ndarray:
        gone = 1 - widths / SPACE.sizes
        return -(gone**2 @ np.array([1.0, 3.0, 0.5, 2.0]) + 2 * (gone[:, 1:] * gone[:, :-1]).sum(1))


def separable(groups=SPACE.groups, seed: int = 0) -> SeparableReward:
    """Convex curves of very different steepness."""
    random = np.random.default_rng(seed)
    return SeparableReward.from_relative([10 ** random.uniform(-1, 1) * np.linspace(0, 1, size + 1)[1:] ** 2
                                          for size in groups.sizes])


REWARDS = {"separable": separable(), "coupled": Coupled()}


def everything(reward) -> np.ndarray:
    """Rewards of all allocations in the space."""
    every = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(SPACE.low, SPACE.sizes))), -1).reshape(-1, 4)
    return reward.score(every[SPACE.meets(every)])


def searched(name: str, reward, evaluations: int = 400, seed: int = 0, space: Space = SPACE):
    search = import_module(f"hobs_rspar.allocation.{name}").search
    return run(search, reward, space, evaluations, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("name", MISSING)
def test_a_search_comes_near_the_optimum_within_its_evaluations(name, kind):
    reward = Recorded(REWARDS[kind])
    every = everything(REWARDS[kind])
    found = searched(name, reward)
    missing = (every.max() - found.score) / (every.max() - every.mean())
    assert len(every) > 500 and -1e-12 <= missing <= MISSING[name]
    assert SPACE.meets(found.widths[None]).all()
    assert found.score == pytest.approx(float(REWARDS[kind].score(found.widths[None])[0]), rel=1e-12)
    assert len(set(reward.asked)) == len(reward.asked) == found.evaluations <= 400
    assert found.score == max(score for widths, score in zip(reward.asked, REWARDS[kind].score(np.array(reward.asked)))
                              if SPACE.meets(np.array([widths])).all())


@pytest.mark.parametrize("name", MISSING)
def test_a_search_depends_on_its_seed_alone(name):
    runs = [Recorded(Coupled()) for _ in range(3)]
    for reward, seed in zip(runs, (5, 5, 6)):
        searched(name, reward, 120, seed)
    assert runs[0].asked == runs[1].asked
    assert (runs[0].asked == runs[2].asked) == (name == "greedy")


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("evaluations", [1, 2, 30])
def test_a_search_stops_where_it_must(name, evaluations):
    reward = Recorded(Coupled())
    found = searched(name, reward, evaluations)
    assert len(reward.asked) == found.evaluations <= evaluations and SPACE.meets(found.widths[None]).all()


@pytest.mark.parametrize("name", MISSING)
def test_a_search_meets_the_budget_of_a_real_network(name):
    groups = zoo_groups("resnet20")
    space = Space(groups, 0.26, 0.1)
    found = searched(name, separable(groups), 150, space=space)
    assert abs(float(groups.macs(found.widths)) / groups.dense_macs - 0.26) <= 0.0026
    assert (found.widths >= space.low).all() and (found.widths <= space.sizes).all()


# --- trials

def test_a_trial_counts_different_allocations_and_remembers_the_best():
    reward = Recorded(Coupled())
    trial = Trial(reward, SPACE, 10)
    assert reward.asked == [tuple(SPACE.uniform)] and trial.score_of_best == trial.score_of_uniform
    full, near = SPACE.sizes[None], SPACE.project(np.array([[1.0, 3.0, 0.5, 2.0]]))
    assert trial.score(np.concatenate([full, near, full, near])).tolist() == pytest.approx(
        Coupled().score(np.concatenate([full, near, full, near])).tolist())
    assert trial.left == 7 and len(reward.asked) == 3
    assert (trial.best == near[0]).all()  # the dense network scores higher, but does not meet the budget
    found = trial.result()
    assert [entry[0] for entry in found.history] == [1, 3] and found.history[-1][2] == found.score
    assert found.evaluations == 3 and found.seconds >= found.history[-1][1] >= 0


def test_a_trial_evaluates_what_still_fits():
    reward, generator = Recorded(Coupled()), np.random.default_rng(0)
    trial = Trial(reward, SPACE, 5)
    with pytest.raises(Spent):
        trial.score(SPACE.project(generator.uniform(0.1, 1, (40, 4))))
    assert len(reward.asked) == 5 and trial.progress == 1
    with pytest.raises(Spent):
        trial.score(SPACE.uniform[None])


def test_a_run_ends_where_a_search_repeats_itself_and_when_time_is_up():
    proposed = []

    def stubborn(trial, generator):
        while True:
            proposed.append(trial.proposed)
            trial.score(SPACE.uniform[None])

    assert run(stubborn, Coupled(), SPACE, 100, None).evaluations == 1 and len(proposed) == PATIENCE * 100
    proposed.clear()
    assert run(stubborn, Coupled(), SPACE, 100, None, seconds=1e-9).evaluations == len(proposed) == 1
    with pytest.raises(ZeroDivisionError):  # only its own end is quiet
        run(lambda trial, generator: 1 / 0, Coupled(), SPACE, 100, None)


# --- dynamic programming

def test_the_knapsack_is_exact():
    random = np.random.default_rng(0)
    for _ in range(30):
        values = [random.random(n) for n in (4, 3, 5)]
        costs = [np.append(0, random.integers(0, 9, n - 1)) for n in (4, 3, 5)]
        grid = np.stack(np.meshgrid(*map(np.arange, (4, 3, 5)), indexing="ij"), -1).reshape(-1, 3)
        worth = sum(value[grid[:, i]] for i, value in enumerate(values))
        price = sum(cost[grid[:, i]] for i, cost in enumerate(costs))
        chosen = dynamic.knapsack(values, costs, 12)
        assert sum(cost[i] for cost, i in zip(costs, chosen)) <= 12
        assert sum(value[i] for value, i in zip(values, chosen)) == pytest.approx(worth[price <= 12].max())


def test_macs_are_a_sum_once_the_streams_are_fixed():
    groups = zoo_groups("resnet20")
    space = Space(groups, 0.26, 0.1)
    fixed = dynamic.coupled(space)
    assert [groups[g].name for g in sorted(fixed)] == ["conv1", "layer2.0.conv2", "layer3.0.conv2"]
    free = [g for g in range(len(groups)) if g not in fixed]
    base, random = space.uniform, np.random.default_rng(0)
    widths = base.copy()
    widths[free] = random.integers(1, groups.sizes[free] + 1)
    alone = np.repeat(base[None], len(free), 0)
    alone[np.arange(len(free)), free] = widths[free]
    assert groups.macs(widths) - groups.macs(base) == (groups.macs(alone) - groups.macs(base)).sum()


def test_dynamic_programming_alone_is_near_the_optimum_of_a_separable_reward():
    reward = separable()
    curves = []
    for g, (low, size) in enumerate(zip(SPACE.low, SPACE.sizes)):
        options = np.repeat(SPACE.sizes[None], size - low + 1, 0)
        options[:, g] = np.arange(low, size + 1)
        curves.append(dynamic.Curve(options[:, g], reward.score(options)))
    widths = dynamic.solve(SPACE, curves)
    every = everything(reward)
    assert float(SPACE.groups.macs(widths)) <= SPACE.ceiling
    assert every.max() - reward.score(widths[None])[0] <= 0.03 * (every.max() - every.mean())


def test_local_search_ends_where_nothing_is_left_to_try():
    small = Space(chain(3, 3, 3), 0.5, 0.1, 0.1)
    assert searched("local_search", separable(small.groups), 10**6, space=small).evaluations <= 27
    whole = Space(SPACE.groups, 1.0, 0.1)
    assert searched("local_search", Coupled(), 10**6, space=whole).evaluations == 1


# --- the walk

def test_the_overshoot_is_that_of_the_raw_action():
    space = Space(zoo_groups("resnet20"), 0.26, 0.1)
    assert space.overshoot(np.ones((1, 12)))[0] == pytest.approx(1 / 0.26 - 1)
    assert space.overshoot(np.full((1, 12), 0.2))[0] == 0


def test_states_of_a_walk():
    walk = Walk(np.arange(8.0).reshape(4, 2))
    walk.behind = 0.5
    ratios, states = walk.run(lambda states: 0.1 + states[:, 0] / 10, 3)
    assert walk.state_dim == 2 + 4 + 1 and states.shape == (4, 3, 7)
    assert ratios[0].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7])
    assert states[2, 1].tolist() == pytest.approx([4, 5, 0.1, 0.3, 0, 0, 0.5])


def test_an_episode_pays_what_it_gains_over_uniform_widths():
    trial = Trial(Coupled(), SPACE, 100)
    walk = RewardedWalk(trial)
    assert trial.left == 100 - 1 - 5  # uniform widths, the dense network, and each group halved
    assert walk.features.shape == (4, 4) and walk.features.max() == 1
    ratios = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.3, 0.6, 0.2, 0.9]])
    gains = walk.pay(ratios)
    scores = [Coupled().score(SPACE.project(row[None]))[0] for row in ratios.double().numpy()]
    assert gains[0] == 0
    assert gains[1].item() == pytest.approx((scores[1] - scores[0]) / -scores[0], rel=1e-5)  # the dense one scores 0
    assert walk.behind == pytest.approx(-gains.mean().item())

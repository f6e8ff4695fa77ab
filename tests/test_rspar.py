"""The reward that is fitted to measured plans, R-SPAR's agent and local search on it, and the search made of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hobs_rspar.allocation import fitted
from hobs_rspar.allocation.climber import Climber
from hobs_rspar.allocation.environment import Evaluation
from hobs_rspar.allocation.fitted import FittedReward
from hobs_rspar.allocation.measured_search import FINALISTS, Model, search
from hobs_rspar.allocation.penalty import AdaptivePenalty
from hobs_rspar.allocation.rspar import REWARD_SCALE, DQNPlayer, Player, PPOPlayer
from hobs_rspar.allocation.space import HeldSpace, Space
from hobs_rspar.allocation.walk import features
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods import _registry
from hobs_rspar.methods._rspar import Options, curves, first_removed, searched
from small import context, statistics_of, zoo_groups
from test_allocation import chain

SPACE = Space(chain(16, 16, 16, 16), 0.35, 0.1, 0.02)
# What a group really costs, relative to the prediction, which thinks that the last group matters most.
PREDICTED, TRUE = np.array([1.0, 1.0, 1.0, 3.0]), np.array([0.3, 6.0, 0.3, 0.3])
MORE = range(2000)  # stands in for the images on which the finalists are compared
QUICK = Options(allocator="ppo", first=6, rounds=2, measured=3, iterations=6, episodes=16, hidden=16)


def bent(steepness: float, size: int = 16) -> np.ndarray:
    """Predicted loss and relative error of every width [size + 1, 2]."""
    gone = 1 - np.arange(size + 1) / size
    return np.stack([steepness * gone**2, gone**1.5], 1)


CURVES = [bent(steepness) for steepness in PREDICTED]


def log_loss(widths: np.ndarray) -> np.ndarray:
    """The true log loss [n]: the same curves with other weights."""
    return -1.0 + sum(weight * curve[column, 0] for weight, curve, column in zip(TRUE, CURVES, widths.T))


class Environment:
    """Measures the true loss; accuracy falls with it. ``planted`` is what the loss on more images adds."""

    def __init__(self, planted=lambda widths: 0.0):
        self.dense, self.seen, self.compared, self.planted = self._of(SPACE.sizes), [], [], planted

    def evaluate(self, widths) -> Evaluation:
        self.seen.append(tuple(int(width) for width in widths))
        return self._of(np.asarray(widths))

    def loss_on(self, widths, images) -> float:
        assert images is MORE
        self.compared.append(tuple(int(width) for width in widths))
        return self._of(np.asarray(widths)).loss + self.planted(self.compared[-1])

    @staticmethod
    def _of(widths: np.ndarray) -> Evaluation:
        loss = float(log_loss(widths[None])[0])
        return Evaluation(0.9 - 0.1 * (loss + 1), float(np.exp(loss)))


def some(count: int, seed: int = 0) -> np.ndarray:
    """Random allocations that meet the budget [n, groups]; the first is uniform."""
    ratios = np.exp(np.random.default_rng(seed).normal(0, 0.4, (count - 1, 4)))
    return np.concatenate([SPACE.uniform[None], SPACE.project(ratios)])


def everything() -> np.ndarray:
    every = np.stack(np.meshgrid(*(np.arange(a, b + 1) for a, b in zip(SPACE.low, SPACE.sizes))), -1).reshape(-1, 4)
    return every[SPACE.meets(every)]


# --- the fitted reward

def test_a_separable_loss_is_recovered_from_measurements():
    measured = some(200)
    ours = FittedReward(CURVES, measured, np.exp(log_loss(measured)))
    others = some(100, seed=1)
    assert np.abs(-ours.score(others) - log_loss(others)).max() < 0.05 * np.ptp(log_loss(others))
    best = others[ours.score(others).argmax()]
    assert log_loss(best[None])[0] == log_loss(others).min()
    prediction = sum(curve[column, 0] for curve, column in zip(CURVES, others.T))
    assert np.corrcoef(prediction, log_loss(others))[0, 1] < 0.9  # which the prediction alone does not give


def test_the_fit_is_a_ridge_regression_towards_the_common_weight():
    """Solved once more as a least-squares problem with the ridge as further rows."""
    measured, random = some(9), np.random.default_rng(3)
    losses = np.exp(log_loss(measured) + random.normal(0, 0.2, 9))
    y = np.log(losses) - np.log(losses).mean()
    columns = []
    for kind in (0, 1):
        centre = np.mean([curve[width, kind] for curve, width in zip(CURVES, measured[0])])
        columns += [[curve[width, kind] / centre for width in column] for curve, column in zip(CURVES, measured.T)]
    raw = np.array(columns).T
    x = raw - raw.mean(0)
    total = x[:, :4].sum(1)
    common = np.linalg.lstsq(total[:, None], y, rcond=None)[0][0]
    prior = np.array([max(common, 0)] * 4 + [0] * 4)
    rows = np.concatenate([x, fitted.RIDGE * np.eye(8)])
    weights = prior + np.linalg.lstsq(rows, np.concatenate([y - x @ prior, np.zeros(8)]), rcond=None)[0]
    noise = np.sqrt(np.square(y - x @ weights).mean())
    spread = np.linalg.pinv(rows)  # [8, 9 + 8]; the covariance of the weights is its square
    wanted = -(np.log(losses).mean() + x @ weights + fitted.PESSIMISM * noise * np.linalg.norm(x @ spread, axis=1))
    ours = FittedReward(CURVES, measured, losses)
    assert ours.weights == pytest.approx(weights, rel=1e-9)
    assert ours.score(measured) == pytest.approx(wanted, rel=1e-9)


def test_a_group_of_one_measured_width_keeps_the_common_weight():
    measured = some(40)
    measured[:, 2] = 9
    ours = FittedReward(CURVES, measured, np.exp(log_loss(measured)))
    weights = ours.weights[:4]
    assert weights[2] > 0 and ours.weights[4 + 2] == pytest.approx(0, abs=1e-12)
    y, x = log_loss(measured), ours._features(measured)
    total = (x - x.mean(0))[:, :4].sum(1)
    assert weights[2] == pytest.approx(total @ (y - y.mean()) / (total @ total))
    assert (np.delete(weights, 2) > weights[2]).all()  # the others have weights of their own
    assert weights.argmax() == TRUE.argmax() and weights.max() > 5 * weights[2]


def test_a_prediction_that_is_wrong_throughout_is_not_followed():
    """The common weight is not negative: a larger predicted loss is never taken for a gain."""
    measured = some(2)
    losses = np.exp(-sum(curve[column, 0] for curve, column in zip(CURVES, measured.T)))
    assert (FittedReward(CURVES, measured, losses)._prior(np.ones((2, 8)), np.array([-1.0, -1.0])) == 0).all()


def test_pessimism_grows_away_from_the_measurements():
    measured, random = some(12), np.random.default_rng(5)
    ours = FittedReward(CURVES, measured, np.exp(log_loss(measured) + random.normal(0, 0.1, 12)))
    near = np.rint(measured.mean(0)).astype(int)
    for g in range(4):
        path = np.repeat(near[None], near[g] - 1, 0)
        path[:, g] = np.arange(near[g], 1, -1)
        x = ours._features(path) - ours.centre
        taken = -(ours.level + x @ ours.weights) - ours.score(path)
        assert (taken >= 0).all() and (np.diff(taken[1:]) > 0).all() and taken[-1] > 3 * taken[0]
    exact = FittedReward(CURVES, some(200), np.exp(log_loss(some(200))))  # little is uncertain
    x = exact._features(path) - exact.centre
    assert (-(exact.level + x @ exact.weights) - exact.score(path)).max() < 0.2 * taken[-1]


# --- what the measurements foretell of accuracy

def test_expected_drops_are_the_line_through_the_measured_ones():
    environment, measured = Environment(), some(20)
    model = Model(environment, CURVES, measured)
    drops = np.array([environment.dense.accuracy - environment.evaluate(row).accuracy for row in measured])
    slope, offset = np.polyfit(model.reward.score(measured), drops, 1)
    assert slope < 0
    assert model.drop(some(30, seed=4)) == pytest.approx(slope * model.reward.score(some(30, seed=4)) + offset)
    assert model.drop(measured).mean() == pytest.approx(drops.mean())


def test_accuracy_that_rises_with_the_loss_foretells_nothing():
    environment, measured = Environment(), some(20)
    right = environment.evaluate
    environment.evaluate = lambda widths: Evaluation(1.8 - right(widths).accuracy, right(widths).loss)
    drops = [environment.dense.accuracy - environment.evaluate(row).accuracy for row in measured]
    assert Model(environment, CURVES, measured).drop(some(5)) == pytest.approx(np.mean(drops))


# --- episodes

def player(seed: int = 0, kind: type = PPOPlayer, **changes) -> Player:
    return kind(SPACE, features(SPACE, np.ones(4)), QUICK.model_copy(update=changes), seed)


class Known:
    """Expects a drop that depends on the second group alone."""

    dense = 0.9

    @property
    def reward(self):
        return SimpleNamespace(score=lambda widths: -self.drop(widths))

    def drop(self, widths: np.ndarray) -> np.ndarray:
        return 0.5 - 0.4 * widths[:, 1] / 16


def test_rewards_by_hand():
    ours = player(penalty_sign=1, penalty_rate=3.0, penalty=0.02)
    ours.visited, ours.expected = [], []
    ratios = np.random.default_rng(0).uniform(0.02, 0.98, (16, 4))
    found, wanted, weights, excess = ours._pay(torch.from_numpy(ratios), Known()) / REWARD_SCALE, [], [], []
    for row in ratios:
        widths = SPACE.project(row[None])[0]
        raw = float(SPACE.groups.macs(np.maximum(1, np.rint(row * 16)))) / SPACE.groups.dense_macs
        drop = 0.5 - 0.4 * widths[1] / 16
        weights.append(AdaptivePenalty(0.02, 3.0, 1).weight(0.9, 0.9 - drop))
        excess.append(max(0.0, raw / 0.35 - 1))
        wanted.append(-drop - weights[-1] * excess[-1])
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    assert min(excess) == 0 < max(excess) and len(set(weights)) > 1
    record = ours.records[-1]
    assert record["reward"] == pytest.approx(np.mean(wanted)) and record["lambda"] == pytest.approx(np.mean(weights))
    assert record["penalty"] == pytest.approx(np.mean(excess)) and record["episode"] == 16
    assert ours.walk.behind == pytest.approx(record["accuracy_drop"])  # the state of the next episodes


def test_the_agent_learns_what_pays():
    ours = player(iterations=30, episodes=32, learning_rate=1e-2)
    ours.propose(Known(), SPACE.uniform[None], 1)
    rewards = [record["reward"] for record in ours.records]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    assert [record["episode"] for record in ours.records] == list(range(32, 31 * 32, 32))


def test_favourites_are_the_best_of_the_round_that_were_not_measured():
    ours = player()
    first = ours.propose(Known(), SPACE.uniform[None], 3)
    visited = np.unique(np.concatenate(ours.visited), axis=0)
    best = visited[np.argsort(Known().drop(visited), kind="stable")]
    assert Known().drop(first).tolist() == Known().drop(best[:3]).tolist() and len(np.unique(first, axis=0)) == 3
    known = np.concatenate([SPACE.uniform[None], first])
    second = player().propose(Known(), known, 3)  # the same episodes again
    assert not {tuple(row) for row in second} & {tuple(row) for row in known}
    assert Known().drop(second).min() >= Known().drop(first).max()
    assert player().propose(Known(), visited, 3).shape == (0, 4)
    ours.propose(Known(), known, 3)
    assert sum(len(widths) for widths in ours.visited) == QUICK.iterations * QUICK.episodes  # of this round alone


# --- what a search may spend

def test_a_search_gains_nothing_by_the_tolerance():
    """What remains is the budget, or what uniform widths spend where that is more."""
    held = HeldSpace(SPACE.groups, SPACE.budget, SPACE.min_ratio, SPACE.tolerance)
    every, macs = everything(), SPACE.groups.macs
    most = max(SPACE.budget * SPACE.groups.dense_macs, macs(SPACE.uniform))
    assert held.meets(every).tolist() == [macs(row) <= most for row in every]
    assert 0 < held.meets(every).sum() < len(every) and held.meets(held.uniform[None])[0]
    assert (held.uniform == SPACE.uniform).all()
    for proposer in (player(), player(0, DQNPlayer), Climber(held, 0)):
        proposer.space = held
        assert held.meets(proposer.propose(Known(), SPACE.uniform[None], 3)).all()


# --- local search

def test_local_search_proposes_different_optima_that_were_not_measured():
    every = everything()
    best = Known().drop(every).min()
    first = Climber(SPACE, 0).propose(Known(), SPACE.uniform[None], 3)
    assert SPACE.meets(first).all() and len(np.unique(np.concatenate([first, SPACE.uniform[None]]), axis=0)) == 4
    assert Known().drop(first[:1])[0] == best
    again = Climber(SPACE, 0).propose(Known(), np.concatenate([SPACE.uniform[None], first]), 3)
    assert not {tuple(row) for row in again} & {tuple(row) for row in first}
    assert (Climber(SPACE, 0).propose(Known(), SPACE.uniform[None], 3) == first).all()
    assert Climber(SPACE, 0).propose(Known(), every, 2).shape == (0, 4)  # nothing is left to measure


# --- the search

PROPOSERS = {"ppo": player, "dqn": lambda seed, **changes: player(seed, DQNPlayer, **changes),
             "local_search": lambda seed, **changes: Climber(SPACE, seed)}


def run(seed: int = 0, planted=lambda widths: 0.0, allocator: str = "ppo", **changes):
    environment, options = Environment(planted), QUICK.model_copy(update=changes)
    proposer = PROPOSERS[allocator](seed, **changes)
    return environment, search(environment, CURVES, SPACE, proposer, options, seed, MORE)


@pytest.mark.parametrize("allocator", PROPOSERS)
def test_the_search_finds_what_the_prediction_alone_does_not(allocator):
    every = everything()
    losses = log_loss(every)
    uniform = log_loss(SPACE.uniform[None])[0]
    predicted = every[np.argmin(sum(curve[column, 0] for curve, column in zip(CURVES, every.T)))]
    for seed in range(3):
        _, found = run(seed, allocator=allocator, first=10, rounds=3, measured=4, iterations=12, episodes=64)
        reached = (uniform - log_loss(found.widths[None])[0]) / (uniform - losses.min())
        assert 0.85 < reached <= 1
    assert log_loss(predicted[None])[0] > uniform


@pytest.mark.parametrize("allocator", PROPOSERS)
def test_the_choice_was_measured_and_meets_the_budget(allocator):
    environment, found = run(allocator=allocator)
    chosen = tuple(found.widths.tolist())
    measured = {tuple(np.rint(np.array(record["ratios"]) * 16).astype(int).tolist()) for record in found.measured}
    assert chosen in measured == set(environment.seen) and environment.seen[0] == tuple(SPACE.uniform)
    assert SPACE.meets(found.widths[None]).all()
    assert len(measured) == len(found.measured) <= QUICK.first + QUICK.rounds * QUICK.measured
    lowest = sorted(measured, key=lambda widths: log_loss(np.array([widths]))[0])[:FINALISTS]
    assert set(environment.compared) == {tuple(SPACE.uniform), *lowest}
    assert chosen == lowest[0]
    assert found.chosen.startswith(f"lowest loss on 2000 validation images among the {FINALISTS} best measured")


def test_more_images_decide_among_the_finalists():
    plain = run()[1]
    best = tuple(plain.widths.tolist())
    environment, found = run(planted=lambda widths: 10.0 * (widths == best))
    assert best in environment.compared and tuple(found.widths.tolist()) != best
    uniform = tuple(SPACE.uniform.tolist())
    assert run(planted=lambda widths: -10.0 * (widths == uniform))[1].widths.tolist() == list(uniform)


def test_records_of_a_search():
    environment, found = run()
    assert [record["episode"] for record in found.episodes] == list(range(16, 193, 16))  # 2 rounds of 6 updates of 16
    for record in found.episodes:
        assert record.keys() == {"episode", "reward", "accuracy_drop", "penalty", "lambda", "raw_macs_ratio",
                                 "macs_ratio", "ratios"}
        assert 1e-4 <= record["lambda"] <= 0.1 and abs(record["macs_ratio"] - 0.35) <= 0.007
    measured = [record["updates"] for record in found.measured]
    assert measured == sorted(measured) and set(measured) == {0, 6, 12} and measured.count(0) <= QUICK.first
    assert measured.count(6) == measured.count(12) == QUICK.measured
    for record in found.measured:
        widths = np.rint(np.array(record["ratios"]) * 16).astype(int)
        seen = environment.evaluate(widths)
        assert record["accuracy_drop"] == environment.dense.accuracy - seen.accuracy and record["loss"] == seen.loss
        assert record["macs_ratio"] == float(SPACE.groups.macs(widths)) / SPACE.groups.dense_macs
    assert any(record["penalty"] > 0 for record in found.episodes)  # of the raw action, before projection


@pytest.mark.parametrize("allocator", PROPOSERS)
def test_the_search_depends_on_its_seed_alone(allocator):
    (_, first), (_, same), (_, other) = (run(seed, allocator=allocator) for seed in (3, 3, 4))
    assert first.episodes == same.episodes and first.measured == same.measured
    assert (first.widths == same.widths).all() and first.measured != other.measured
    assert (first.episodes != other.episodes) == bool(first.episodes) == (allocator != "local_search")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("allocator", PROPOSERS)
def test_nothing_to_remove(allocator):
    """One allocation only: nothing can be learnt, and no number is made of it."""
    space = Space(SPACE.groups, 1.0, 0.1)
    proposers = {"local_search": Climber(space, 0), "dqn": DQNPlayer(space, features(space, np.ones(4)), QUICK, 0),
                 "ppo": PPOPlayer(space, features(space, np.ones(4)), QUICK, 0)}
    found = search(Environment(), CURVES, space, proposers[allocator], QUICK, 0, MORE)
    assert found.widths.tolist() == [16] * 4 and len(found.measured) == 1
    assert all(np.isfinite(record["reward"]) for record in found.episodes)


# --- the methods

def test_curves_are_indexed_by_width():
    scores, relative = [torch.tensor([3.0, 1.0, 6.0])], [torch.tensor([0.1, 0.4, 1.0])]
    order = [torch.tensor([1, 0, 2])]
    assert curves(scores, order, relative)[0] == pytest.approx(
        np.array([[6, 1.0], [3, 0.4], [1, 0.1], [0, 0]]))  # widths 0, 1, 2 and 3


def test_sums_of_single_scores_rank_as_the_scores_do():
    random = torch.Generator().manual_seed(0)
    scores = [torch.rand(50, generator=random), torch.tensor([0.0, 2.0, 0.0, 2.0, 1.0]), torch.zeros(4)]
    sums, shares = first_removed(scores)
    for score, total, share in zip(scores, sums, shares):
        order = torch.argsort(score, stable=True)
        assert torch.equal(torch.argsort(total, stable=True), order)
        assert torch.allclose(total[order], score[order].double().cumsum(0))
        assert (share.diff() >= 0).all() and share[-1] == (1 if score.any() else 0)


@pytest.fixture(scope="module")
def plans() -> dict:
    """Quick plans of R-SPAR and its ablation on a small network."""
    block = {"first": 4, "rounds": 1, "measured": 1, "iterations": 2, "episodes": 4, "hidden": 16, "images": 1000}
    names = ["hobs_rspar", *(f"hobs_rspar_{part}" for part in ("ppo", "no_curvature", "first_order", "no_repair",
                                                                "no_penalty"))]
    return {name: _registry.method(name).plan(context("resnet8", name), _registry.options(name, block))
            for name in names}


def test_variants_differ_in_one_part(plans):
    assert {name: plan.repair for name, plan in plans.items()} == \
        {name: "batchnorm" if name.endswith("no_repair") else "least_squares" for name in plans}
    for name, plan in plans.items():
        weights = [record["lambda"] for record in plan.search["episodes"]]
        assert bool(weights) == name.endswith(("ppo", "no_penalty"))  # the others have no agent
        assert all((weight == 0) == name.endswith("no_penalty") for weight in weights)


def test_variants_rank_by_their_criterion(plans):
    where = context("resnet8", "hobs_rspar")
    hobs = where.per_group(where.sensitivity["hobs"])
    ranked = {"hobs_rspar": hobs, "hobs_rspar_no_repair": hobs, "hobs_rspar_no_penalty": hobs,
              "hobs_rspar_first_order": where.per_group(where.sensitivity["taylor"]),
              "hobs_rspar_no_curvature": filter_norms(where.network, where.groups, 1)}
    for name, scores in ranked.items():
        for score, group in zip(scores, plans[name].groups):
            last = torch.argsort(score, stable=True)[group.channels - len(group.kept):]
            assert group.kept == sorted(last.tolist()), name


def test_a_plan_says_what_its_search_cost(plans):
    found = plans["hobs_rspar"].search
    assert found.keys() == {"evaluations", "images", "chosen", "episodes", "measured"}
    assert len(plans["hobs_rspar_ppo"].search["episodes"]) == 2 and not found["episodes"]
    assert 2 <= found["evaluations"] == len(found["measured"]) <= 5
    assert found["images"] >= 1000 + found["evaluations"] * (128 + 1000)  # dense, then calibration and reward of each


def test_any_order_can_be_searched():
    """What the methods share needs scores and errors, wherever they come from."""
    where, groups = context("resnet8", "hobs_rspar"), zoo_groups("resnet8")
    gates, _ = statistics_of("resnet8")
    scores = [torch.arange(group.channels, dtype=torch.float64) for group in groups]
    options = SimpleNamespace(**QUICK.model_dump() | {"first": 4, "rounds": 1, "measured": 1, "iterations": 1})
    assert options.allocator == "ppo"
    plan = searched(where, options, scores, where.per_group(gates["relative"]), "index")
    assert all(group.kept == list(range(group.channels - len(group.kept), group.channels)) for group in plan.groups)
    assert "index, R-SPAR" in plan.decided_by and abs(plan.macs_ratio - 0.5) <= 0.005

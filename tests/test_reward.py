"""Rewards by look-up, against sums and masks worked out one by one."""

import numpy as np
import pytest
import torch

from hobs_rspar.allocation import reward
from hobs_rspar.allocation.reward import JointReward, SeparableReward
from hobs_rspar.curvature.joint import JointModel
from hobs_rspar.errors import UserError

SIZES = (5, 3, 7)


def widths(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([random.integers(0, size + 1, count) for size in SIZES], 1)


def rows(seed: int, images: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.1, 1, (images, sum(SIZES))).astype(np.float32)


def model(true: np.ndarray, sampled: np.ndarray) -> JointModel:
    return JointModel.of_gates(torch.from_numpy(true), torch.from_numpy(sampled))


def orders(seed: int = 3) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.permutation(size) for size in SIZES]


def removed(kept: np.ndarray, order: list[np.ndarray]) -> np.ndarray:
    """1 where a channel is removed, 0 where it is kept [channels of all groups]."""
    mask, start = np.zeros(sum(SIZES)), 0
    for width, channels in zip(kept, order):
        mask[start + channels[:len(channels) - width]] = 1
        start += len(channels)
    return mask


def test_separable_rewards_are_minus_the_errors_after_so_many_eliminations():
    random = np.random.default_rng(1)
    relative = [random.random(size).cumsum() for size in SIZES]
    ours = SeparableReward.from_relative(relative)
    for kept, score in zip(widths(50), ours.score(widths(50))):
        gone = np.array(SIZES) - kept
        wanted = -sum(errors[k - 1] for errors, k in zip(relative, gone) if k)
        assert score == pytest.approx(wanted, rel=1e-12, abs=1e-15)
    assert ours.score(np.array([SIZES]))[0] == 0
    assert ours.score(np.array([[5, 2, 7]]))[0] == -relative[1][0]  # one channel removed: the first entry


def test_curves_are_indexed_by_width():
    ours = SeparableReward([np.array([9.0, 1.0, 0.0]), np.array([4.0, 0.5])])
    assert ours.score(np.array([[0, 0], [1, 1], [2, 1]])).tolist() == [-13.0, -1.5, -0.5]


def test_joint_rewards_are_the_second_order_model_of_the_masks():
    true, sampled, order = rows(1), rows(2), orders()
    ours = JointReward(model(true, sampled), order)
    for kept, score in zip(widths(60), ours.score(widths(60))):
        gone = removed(kept, order)
        change = -gone @ true.astype(float).mean(0) + 0.5 * np.square(sampled.astype(float) @ gone).mean()
        assert score == pytest.approx(-change, rel=1e-9, abs=1e-12)
    assert ours.score(np.array([SIZES])).tolist() == [0.0]


def test_joint_rewards_are_not_separable():
    true, sampled, order = rows(1), rows(2), orders()
    ours = JointReward(model(true, sampled), order)
    both, first, second = ours.score(np.array([[2, 1, 7], [2, 3, 7], [5, 1, 7]]))
    cross = (sampled @ removed([2, 3, 7], order)) @ (sampled @ removed([5, 1, 7], order)) / len(sampled)
    assert both - first - second == pytest.approx(-cross, rel=1e-5) and abs(cross) > 1e-3


def test_a_table_that_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(reward, "MOST", 17)
    with pytest.raises(UserError, match="joint model of 15 channels.*at most 14 channels.*separable"):
        JointReward(model(rows(1), rows(2)), orders())

"""Widths in multiples: never above the budget, as near as a brute force finds, whole where they must be."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hobs_rspar.allocation.rounding import in_multiples
from hobs_rspar.allocation.space import Space
from hobs_rspar.errors import UserError
from small import ZOO, context, zoo_groups


@pytest.mark.parametrize("name", sorted(ZOO))
@pytest.mark.parametrize("multiple", [2, 4, 8])
def test_multiples_within_the_budget(name, multiple):
    space = Space(zoo_groups(name), 0.5, 0.0, round_to=multiple)
    if min(space.sizes) < multiple:
        pytest.skip("a group is smaller than the multiple")
    widths = space.uniform
    found = in_multiples(space, widths)
    whole = np.array([bool(group.protected) for group in space.groups])
    assert (((found % multiple == 0) | (found == space.sizes)) & (found >= space.low))[~whole].all()
    assert (found[whole] == space.sizes[whole]).all()
    assert space.expense.of(found) <= max(space.target, space.expense.of(widths))
    more = np.minimum(found + multiple * np.eye(len(found), dtype=int), space.sizes)
    grown = more[(more != found).any(1)]
    assert (space.expense.of(grown) > max(space.target, space.expense.of(widths))).all()  # no room is left


def test_near_to_the_best_that_brute_force_finds():
    """Within half a multiple a group of the nearest widths that spend no more, over many wishes."""
    space = Space(zoo_groups("resnet8"), 0.4, 0.1, round_to=8)
    least = np.minimum(space.sizes, -(-space.low // 8) * 8)
    every = np.array(list(itertools.product(*(range(low, size + 1, 8) for low, size in zip(least, space.sizes)))))
    wishes = space.project(np.random.default_rng(0).uniform(0.3, 1, (20, len(space.sizes))))
    for widths in wishes:
        allowed = every[space.expense.of(every) <= max(space.target, space.expense.of(widths))]
        best = np.abs((allowed - widths) / space.sizes).sum(1).min()
        assert np.abs((in_multiples(space, widths) - widths) / space.sizes).sum() <= best + 0.5


def test_all_widths_and_single_channels_stay():
    space = Space(zoo_groups("resnet8"), 0.5, round_to=8)
    assert (in_multiples(space, space.sizes) == space.sizes).all()  # unpruned keeps everything
    single = replace(space, round_to=1)
    assert (in_multiples(single, single.uniform) == single.uniform).all()


def test_a_budget_below_one_multiple_is_refused():
    space = Space(zoo_groups("resnet8"), 0.03, round_to=16)
    with pytest.raises(UserError, match="multiples of 16.*lower allocation.round_to"):
        in_multiples(space, space.uniform)


def test_every_method_gets_its_widths_rounded_and_says_so():
    given = context("resnet8", "l1")
    given.space = replace(given.space, round_to=8)
    from hobs_rspar.methods import l1

    plan = l1.plan(given, l1.Options())
    assert all(len(group.kept) % 8 == 0 for group in plan.groups)
    assert plan.macs_ratio <= 0.5 and "multiples of 8" in plan.decided_by

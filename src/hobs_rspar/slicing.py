"""The one surgery: a plan is carried out by slicing every tensor along its groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from hobs_rspar import checkpoint
from hobs_rspar.coupling import Groups


def remove(network: nn.Module, groups: Groups, plan) -> nn.Module:
    """A physically pruned copy of ``network``.

    Args:
        network: the dense network; untouched.
        groups: of the network.
        plan: a :class:`PruningPlan`.

    Returns:
        The smaller network, in evaluation mode; frozen parameters stay frozen, tied ones tied.

    Raises:
        UserError: the plan is for another network.
    """
    plan.check(groups)
    return sliced(network, groups, plan.kept)


def sliced(network: nn.Module, groups: Groups, kept: Sequence[Sequence[int]]) -> nn.Module:
    """A copy of ``network`` in which every group keeps the channels ``kept[g]`` (sorted)."""
    return checkpoint.fit(copy.deepcopy(network), groups.sliced(network.state_dict(), kept), type(network).__name__)

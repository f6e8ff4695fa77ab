"""What an allocation spends of the budget: MACs, or the latency that a measured table foretells."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from hobs_rspar.coupling import Groups
from hobs_rspar.errors import UserError
from hobs_rspar.hardware.latency_table import LatencyTable


class Expense(Protocol):
    """What is limited.

    Attributes:
        unit: for messages, as in ``0.5x MACs``.
        dense: what the dense network spends.
    """

    unit: str
    dense: float

    def of(self, widths: np.ndarray) -> np.ndarray:
        """What widths [..., groups] spend [...]; a search may ask about widths that no network has."""

    def after(self, widths: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """What is spent [n, changes] after each of some changes [changes, groups] of each of widths [n, groups]."""


class Macs:
    """Multiply-accumulates, exactly.

    Args:
        groups: of the dense network.
    """

    unit = "MACs"

    def __init__(self, groups: Groups):
        self.dense, self.of, self.after = groups.dense_macs, groups.macs, groups.macs_after


class Milliseconds:
    """Latency of the whole network as the table foretells it.

    Args:
        groups: of the dense network.
        table: of the same network.

    Raises:
        UserError: the table is another network's.
    """

    unit = "latency"

    def __init__(self, groups: Groups, table: LatencyTable):
        if list(groups.layers) != list(table.layers):
            raise UserError("latency.json is another network's: its layers differ; run 'dvc repro latency'")
        self.groups, self.table = groups, table
        self.dense = float(self.of(groups.sizes))

    def of(self, widths: np.ndarray) -> np.ndarray:
        """Milliseconds [...] of widths [..., groups]; for widths beyond the network's, those of the nearest ones."""
        return self.table.network_ms(*self.groups.layer_widths(np.clip(widths, 1, self.groups.sizes)))

    def after(self, widths: np.ndarray, changes: np.ndarray) -> np.ndarray:
        """Milliseconds [n, changes]."""
        return self.of(widths[:, None] + changes)


def limited(groups: Groups, budget: Mapping[str, float | None], latency: dict) -> tuple[float, Expense]:
    """The kept fraction that a budget allows, and of what.

    Args:
        groups: of the dense network.
        budget: as ``study.budget``: one of ``macs``, ``latency_ratio``, ``latency_ms`` is not None.
        latency: what the latency stage wrote.

    Raises:
        UserError: the budget is a latency, and the table was not measured or is another network's.
    """
    if budget["macs"] is not None:
        return budget["macs"], Macs(groups)
    expense = Milliseconds(groups, LatencyTable.from_json(latency))
    ratio = budget["latency_ratio"] if budget["latency_ms"] is None else budget["latency_ms"] / expense.dense
    return min(1.0, ratio), expense

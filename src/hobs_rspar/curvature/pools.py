"""Greedy elimination of large groups: the order of :mod:`hobs_rspar.curvature.elimination` from large products.

Rounds alternate two steps. Every channel's cost is computed anew; the cheapest form a pool. Then channels leave the
pool one by one, exactly: what removing one does to the others of the pool needs the pool's own rows of A^-1 and of
W^T W alone. That goes on while the cheapest channel of the pool costs no more than the cheapest outside did when the
round began. Where removing a channel makes no other one cheaper, this is the order of one-by-one elimination; where it
does, a channel may leave a little late. Then A^-1 and W are updated for all that left, by one product each.

A^-1 is computed in double precision and, where A is not too ill-conditioned, then kept in single precision: each update
takes something off it, so that its entries, and with them the errors, only shrink. Pools work in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hobs_rspar.curvature.elimination import Consumer, Elimination

COLUMNS = 256  # of A^-1 that belong to a pool; fewer channels make more rounds, more of them longer steps
LEAST = 8  # channels of a pool, where one has many columns
HALVED = 768  # size of a matrix above which it is inverted by halves: LAPACK's own inversion is slower then
SHRUNK = 1 / 8  # of the columns may be those of channels that have left before they are taken out
SINGLE = 1e6  # condition of A up to which single precision gives the order of double precision on real networks


def by_pools(parts: Sequence[Consumer], channels: int, damping: float) -> Elimination:
    """Greedy backward elimination of a group's channels with compensation.

    Args:
        parts: the group's consumers, which together read all channels; untouched.
        channels: of the group.
        damping: of the covariances, relative to their mean diagonal.

    Returns:
        Order, costs and relative errors of all widths.
    """
    states = [_State(part, channels, damping) for part in parts]
    size = max(LEAST, COLUMNS // max(state.columns.shape[1] for state in states))
    alive, order, errors = torch.arange(channels), [], []
    while len(alive):
        costs = sum(state.errors(alive) for state in states)[0]
        ranked = costs.argsort(stable=True)
        limit = costs[ranked[size]] if len(alive) > size else torch.tensor(torch.inf)
        pool = alive[ranked[:size]]
        left, found = _leave([state.pool(pool) for state in states], len(pool), limit)
        order.append(pool[left])
        errors += found
        alive = alive[~torch.isin(alive, pool[left])]
        for state in states:
            state.remove(pool[left], alive)
    cost, error = torch.stack(errors, 1)
    energy = sum(part.energy for part in parts).clamp_min(1e-30)
    return Elimination(torch.cat(order), cost, error.cumsum(0) / energy)


def _leave(pools: list[_Pool], size: int, limit: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Eliminates channels of a pool, at least one, as long as they cost no more than ``limit``.

    Returns:
        Their places in the pool, in order, and of each its cost and squared output error [2].
    """
    stays, left, found = torch.ones(size, dtype=torch.bool), [], []
    with _one_thread():
        while stays.any():
            errors = sum(pool.errors() for pool in pools)
            best = int(errors[0].masked_fill(~stays, torch.inf).argmin())
            if left and errors[0, best] > limit:
                break
            stays[best] = False
            left.append(best)
            found.append(errors[:, best])
            for pool in pools:
                pool.remove(best)
    return torch.tensor(left), found


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many small steps, at the end of each of which threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _State:
    """One consumer, its weight compensated for the channels that have left, and their columns out of its inverse.

    The covariance is taken relative to its mean diagonal, so that single precision never overflows.
    """

    def __init__(self, part: Consumer, channels: int, damping: float):
        own = torch.arange(channels) if part.channels is None else part.channels
        self.place = torch.full((channels,), -1).index_put_((own,), torch.arange(len(own)))
        self.level = part.covariance.diagonal().mean()
        self.columns = part.columns
        self.half = 0.5 * part.fisher
        varies = self.level > 0
        relative = part.covariance / self.level if varies else torch.eye(len(part.covariance), dtype=torch.float64)
        inverse, condition = regular_inverse(relative, damping)
        self.inverse = inverse.float() if condition <= SINGLE else inverse
        self.rows = part.weight.flatten(1).T.to(self.inverse)  # [d, outputs]
        self.used = torch.ones(len(self.inverse), dtype=torch.bool)

    def errors(self, channels: Tensor) -> Tensor:
        """Cost and squared output error of removing each of some channels, all others compensating [2, channels]."""
        own = self.place[channels]
        columns = self.columns[own[own >= 0]]
        block = torch.linalg.inv(self.inverse[columns[:, :, None], columns[:, None, :]])
        rows = self.rows[columns]  # [channels, block, outputs]
        forms = (rows * self.half.to(rows)) @ rows.mT, rows @ rows.mT
        found = torch.zeros(2, len(channels), dtype=torch.float64)
        found[:, own >= 0] = self.level * torch.stack([(block * form).sum((1, 2)) for form in forms]).double()
        return found

    def pool(self, channels: Tensor) -> _Pool:
        own = self.place[channels]
        columns = self.columns[own[own >= 0]].flatten()
        rows = self.rows[columns].double()
        forms = torch.stack([(rows * self.half) @ rows.T, rows @ rows.T]) * self.level
        return _Pool(own >= 0, self.inverse[columns][:, columns].double(), forms)

    def remove(self, channels: Tensor, alive: Tensor) -> None:
        """Compensates the rows that stay and takes the channels' columns out of the inverse."""
        own = self.place[channels]
        columns = self.columns[own[own >= 0]].flatten()
        if len(columns) == 0:
            return
        root = torch.linalg.cholesky(self.inverse[columns][:, columns].double()).to(self.inverse)
        step = torch.linalg.solve_triangular(root, self.inverse[columns], upper=False)
        change = torch.linalg.solve_triangular(root, self.rows[columns], upper=False)
        self.rows.addmm_(step.T, change, alpha=-1)
        self.inverse.addmm_(step.T, step, alpha=-1)
        self.used[columns] = False
        if (~self.used).sum() > SHRUNK * len(self.used):
            self._shrink(self.place[alive])

    def _shrink(self, alive: Tensor) -> None:
        """Leaves out the columns of channels that have left."""
        used = self.used.nonzero()[:, 0]
        self.inverse, self.rows = self.inverse[used].index_select(1, used), self.rows[used]
        moved = self.used.cumsum(0) - 1
        alive = alive[alive >= 0]
        self.columns[alive] = moved[self.columns[alive]]
        self.used = torch.ones(len(used), dtype=torch.bool)


class _Pool:
    """The part of one consumer that belongs to a pool.

    Args:
        reads: which channels of the pool the consumer reads [pool].
        inverse: their rows and columns of A^-1 [k, k].
        forms: of W^T G W / 2 and W^T W [2, k, k].
    """

    def __init__(self, reads: Tensor, inverse: Tensor, forms: Tensor):
        self.reads, self.inverse, self.forms = reads, inverse, forms
        self.count = int(reads.sum())
        self.block = len(inverse) // max(1, self.count)
        self.place = reads.cumsum(0) - 1

    def errors(self) -> Tensor:
        """Cost and squared output error of removing each channel [2, pool]."""
        found = torch.zeros(2, len(self.reads), dtype=torch.float64)
        if self.count:
            block = torch.linalg.inv(self._blocks(self.inverse))
            found[:, self.reads] = torch.stack([(block * self._blocks(form)).sum((1, 2)) for form in self.forms])
        return found

    def remove(self, channel: int) -> None:
        """What :func:`hobs_rspar.curvature.elimination.one_by_one` does, on the pool alone."""
        if not self.reads[channel]:
            return
        start = int(self.place[channel]) * self.block
        own = slice(start, start + self.block)
        step = torch.linalg.solve(self.inverse[own, own], self.inverse[own])  # W <- W - W_J step
        self.inverse.addmm_(self.inverse[:, own].clone(), step, alpha=-1)
        self.inverse[own, own] = torch.eye(self.block, dtype=step.dtype)  # keeps the block regular
        for form in self.forms:
            half = form[own] - 0.5 * form[own, own] @ step
            form.addmm_(torch.cat([step, half]).T, torch.cat([half, step]), alpha=-1)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """Diagonal blocks of a matrix [channels, block, block]."""
        shape = (self.count, self.block, self.count, self.block)
        return matrix.view(shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def regular_inverse(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Inverse of a covariance [d, d], damped as :func:`regularly` does, and a bound of its condition."""
    regular, found = regularly(inverted, matrix, damping)
    return found, float(regular.abs().sum(1).max() * found.diagonal().max())


def regularly(made: Callable[[Tensor], Tensor], covariance: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A damped covariance that is positive definite, and what is made of it.

    Rounding of large means may leave a covariance that is not, even as damped. Then it is damped ten times more, and
    again, until it is.

    Args:
        made: raises torch's LinAlgError for a matrix that is not positive definite.
        covariance: [d, d].
        damping: relative to its mean diagonal.
    """
    level = covariance.diagonal().mean().clamp_min(1e-30)
    while True:
        regular = covariance.clone()
        regular.diagonal().add_(damping * level)
        try:
            return regular, made(regular)
        except torch.linalg.LinAlgError:
            damping *= 10


def inverted(matrix: Tensor) -> Tensor:
    """Inverse of a symmetric positive definite matrix [d, d], of large ones by halves."""
    size = len(matrix)
    if size <= HALVED:
        return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    upper, lower = slice(size // 2), slice(size // 2, size)
    first = inverted(matrix[upper, upper])
    step = first @ matrix[upper, lower]
    rest = inverted(matrix[lower, lower] - matrix[lower, upper] @ step)
    cross = step @ rest
    found = torch.empty_like(matrix)
    found[upper, upper] = torch.addmm(first, cross, step.T)
    found[upper, lower], found[lower, upper], found[lower, lower] = -cross, -cross.T, rest
    return found

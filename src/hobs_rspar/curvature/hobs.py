"""H-OBS: second-order sensitivity of coupled channels.

A channel is removed where it is consumed, so its cost is the Optimal Brain Surgeon's (Hassibi & Stork 1993) on the
consumers' inputs, with the Kronecker-factored Hessian A (x) G of :mod:`hobs_rspar.curvature.kfac`, of G its diagonal.
Removing the inputs J of a channel from a consumer W, with every other weight compensating optimally, costs

    dL_J = 1/2 tr(G W_J [(A^-1)_JJ]^-1 W_J^T),      W <- W - W_J [(A^-1)_JJ]^-1 (A^-1)_J:

summed over all consumers of the group (residual streams have several). Channels are eliminated greedily; A^-1 is
downdated after each, so one elimination order holds the kept set and the error of every width. Small groups go channel
by channel (curvature/elimination.py), large ones by pools of them (curvature/pools.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Group, Groups
from hobs_rspar.curvature.consumers import centred, consumers
from hobs_rspar.curvature.elimination import Consumer, Elimination, one_by_one
from hobs_rspar.curvature.kfac import KFACHessianApproximator, damped
from hobs_rspar.curvature.passes import sweep
from hobs_rspar.curvature.pools import by_pools
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError

__all__ = ["Consumer", "Elimination", "Sensitivity", "analyse", "centred", "collect_factors", "consumers", "eliminate",
           "kfac_hessian", "kfac_score"]

SMALL = 2**28  # multiplications for a consumer up to which its group goes channel by channel: a quarter of a second


@dataclass(frozen=True)
class Sensitivity:
    """Scores per group, ``kfac`` and ``hobs`` [channels], and the eliminations.

    ``kfac`` is empty where not every consumer that is scored has the whole of its output factor.
    """

    scores: dict[str, list[Tensor]]
    eliminations: list[Elimination]


def eliminate(parts: Sequence[Consumer], damping: float) -> Elimination:
    """Greedy backward elimination of a group's channels with compensation.

    Args:
        parts: the group's consumers, which together read all channels; untouched.
        damping: of the covariances, relative to their mean diagonal.

    Returns:
        Order, costs and relative errors of all widths.

    Raises:
        UserError: a covariance is not finite.
    """
    for part in parts:
        if not part.covariance.isfinite().all():
            raise UserError(f"{part.source[0]}: the second moments of its inputs are not finite; its activations "
                            "overflow on these images, so look at their scale, or protect its channels")
    whole = all(part.channels is None for part in parts)
    if whole and all(_work(part) <= SMALL and _regular(part.covariance, damping) for part in parts):
        return one_by_one(parts, damping)
    channels = len(parts[0].index) if whole else 1 + max(int(part.channels.max()) for part in parts)
    return by_pools(parts, channels, damping)


def _work(part: Consumer) -> int:
    """Multiplications of one-by-one elimination: the downdates of A^-1 and W, and twice the products for all costs."""
    return part.columns.numel() * len(part.covariance) * (len(part.covariance) + 3 * len(part.weight))


def _regular(covariance: Tensor, damping: float) -> bool:
    """Whether a covariance is positive definite as damped; rounding of large means may leave one that is not."""
    return bool(covariance.diagonal().sum() > 0) and not torch.linalg.cholesky_ex(damped(covariance, damping)).info


def kfac_hessian(parts: Sequence[Consumer], fisher: Sequence[Tensor]) -> Tensor:
    """Kronecker-factored Hessian of closing a group's gates: H_cd = tr(G W_c A_cd W_d^T), summed over consumers.

    Its diagonal is twice the K-FAC score; with the cross terms it is the group's joint model, without compensation.

    Args:
        parts: the consumers.
        fisher: their full output factors G [outputs, outputs].

    Returns:
        [channels, channels].
    """
    own = [torch.arange(len(part.index)) if part.channels is None else part.channels for part in parts]
    size = 1 + max(int(channels.max()) for channels in own)
    total = torch.zeros(size, size, dtype=torch.float64)
    for part, channels, g in zip(parts, own, fisher):
        weight, columns = part.weight.flatten(1), part.columns  # [channels, block]
        terms = (weight.T @ g.double() @ weight) * part.covariance
        rows = terms[columns.flatten()][:, columns.flatten()]
        total[channels[:, None], channels] += rows.view(*columns.shape, *columns.shape).sum((1, 3))
    return total


def kfac_score(parts: Sequence[Consumer], fisher: Sequence[Tensor]) -> Tensor:
    """Kronecker-factored OBD of closing each gate: 1/2 tr(G W_c A_cc W_c^T), summed over consumers [channels]."""
    return 0.5 * kfac_hessian(parts, fisher).diagonal()


def collect_factors(network: nn.Module, images: Images, options, generator: torch.Generator) -> dict[str, Tensor]:
    """Kronecker factors of all layers over calibration images, as ``<layer>/a`` and ``<layer>/g`` on the CPU.

    Args:
        network: in evaluation mode; untouched.
        images: calibration images.
        options: ``params.sensitivity`` (batch_size, positions, damping).
        generator: draws positions and labels.
    """
    kfac = KFACHessianApproximator(network, options.damping, 1, options.positions, generator)
    sweep(network, images, options.batch_size, [kfac], generator)
    return kfac.stored()


def analyse(network: nn.Module, every: Groups, factors: Mapping[str, Tensor], damping: float,
            fallback: Callable[[], Sequence[Tensor]] | None = None) -> Sensitivity:
    """K-FAC scores and eliminations of all groups from the factors.

    Args:
        network: whose weights are eliminated; untouched.
        every: its groups.
        factors: see :func:`hobs_rspar.curvature.consumers.consumers`.
        damping: of the covariances, relative to their mean diagonal.
        fallback: gives other scores in units of the loss, per group [channels], such as the gates' Fisher; called
            where a group that may shrink has no consumer with factors.

    Raises:
        UserError: there is such a group, and no ``fallback``.
    """
    found, kfac = [], []
    for number, group in enumerate(every):
        parts = consumers(group, network, factors)
        if not parts:
            nothing = torch.zeros(group.channels, dtype=torch.float64)
            found.append(Elimination.of_scores(nothing if group.protected else _others(group, fallback)[number]))
            kfac.append(nothing)
            continue
        found.append(eliminate(parts, damping))
        if all(f"{part.source[0]}/g" in factors for part in parts):
            kfac.append(kfac_score(parts, [factors[f"{layer}/g"][i] for layer, i in (p.source for p in parts)]))
    scores = {"kfac": kfac if len(kfac) == len(found) else [], "hobs": [elimination.score for elimination in found]}
    return Sensitivity(scores, found)


def _others(group: Group, fallback: Callable[[], Sequence[Tensor]] | None) -> Sequence[Tensor]:
    if fallback is None:
        names = ", ".join(member.layer for member in group.with_role("consumer"))
        raise UserError(f"group {group.name}: none of its consumers ({names}) can be scored by its weight and inputs; "
                        f"protect '{group.name}', or take a method that needs no curvature, such as l1 or taylor")
    return fallback()

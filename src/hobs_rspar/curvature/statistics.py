"""All statistics that methods use, from one set of calibration images: what the sensitivity stage stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms
from hobs_rspar.curvature.filters import FilterMoments, filter_scores, kron_obd
from hobs_rspar.curvature.gates import GateGradients, Gates, fisher_score, relabelled, signed_score, taylor_score
from hobs_rspar.curvature.hobs import analyse
from hobs_rspar.curvature.kfac import KFACHessianApproximator, Wanted
from hobs_rspar.curvature.passes import sweep
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError

SCORES = ("l1", "taylor", "fisher", "signed", "obd", "kron_obd", "kron_obs", "kfac", "hobs")
TAYLOR_BATCH = 64  # images whose mean gradient is squared


def collect(network: nn.Module, groups: Groups, images: Images, options, generator: torch.Generator,
            progress=lambda batches: batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gate statistics, scores and Kronecker factors, from one sweep and a second one over a few of the images.

    Args:
        network: in evaluation mode; untouched.
        groups: of the network.
        images: calibration images.
        options: ``params.sensitivity`` (batch_size, positions, damping).
        generator: draws labels and positions.
        progress: wraps the iteration over batches.

    Returns:
        ``gates``: ``true_rows`` and ``sampled_rows`` [N, channels of all groups], the scores of ``SCORES`` and
        ``relative`` (relative output error after each elimination) [channels]; and ``factors``: ``<layer>/a``,
        ``<layer>/g``. All on the CPU; float32, but very large rows are bfloat16.

    Raises:
        UserError: there are no groups, or all are kept whole.
    """
    refuse_nothing(network, groups)
    gates = Gates(groups)
    seen, moments = GateGradients(network, gates, len(images)), FilterMoments(network, groups)
    kfac = KFACHessianApproximator(network, options.damping, 1, options.positions, generator,
                                   Wanted(every_layer(network, groups), True))
    labels = sweep(network, images, options.batch_size, [seen, moments, kfac], generator, progress)
    sampled = seen.rows
    true = relabelled(network, gates, images, options.batch_size, sampled, labels)
    factors = kfac.stored(release=True)
    scores = {**gate_scores(network, groups, true, sampled),
              **eliminations(network, groups, factors, options.damping, lambda: gates.split(fisher_score(sampled))),
              **_float(filter_scores(groups, moments, factors, options.damping))}
    order = {name: scores[name] for name in (*SCORES[:4], "kfac", "hobs", "relative", *SCORES[4:7])}
    return {"true_rows": true, "sampled_rows": sampled, **order}, factors


def gate_statistics(network: nn.Module, groups: Groups, images: Images, options, generator: torch.Generator,
                    progress=lambda batches: batches) -> dict[str, Tensor]:
    """What gates and filters alone tell, without any Kronecker factor; arguments as :func:`collect`.

    Returns:
        ``true_rows``, ``sampled_rows`` [N, channels of all groups]; ``l1``, ``taylor``, ``fisher``, ``signed`` and
        ``kron_obd`` [channels]. All on the CPU.

    Raises:
        UserError: there are no groups, or all are kept whole.
    """
    refuse_nothing(network, groups)
    gates, moments = Gates(groups), FilterMoments(network, groups)
    seen = GateGradients(network, gates, len(images))
    labels = sweep(network, images, options.batch_size, [seen, moments], generator, progress)
    true = relabelled(network, gates, images, options.batch_size, seen.rows, labels)
    return {"true_rows": true, "sampled_rows": seen.rows, **gate_scores(network, groups, true, seen.rows),
            **_float({"kron_obd": kron_obd(groups, moments)})}


def factors(network: nn.Module, layers: Mapping[str, Tensor | None], images: Images, options,
            generator: torch.Generator, progress=lambda batches: batches) -> dict[str, Tensor]:
    """Input factors and the diagonals of the output factors of some layers, from one sweep: what H-OBS needs.

    Args:
        network: in evaluation mode; untouched.
        layers: as :func:`consumer_layers` gives them.
        images: calibration images.
        options: ``params.sensitivity`` (batch_size, positions, damping).
        generator: draws labels and positions.
        progress: wraps the iteration over batches.

    Returns:
        ``<layer>/a`` [groups, d + 1, d + 1] and ``<layer>/fisher`` [outputs] on the CPU. Where d is more than 8,192, A
        is in blocks [groups * blocks, b + 1, b + 1], of the columns ``<layer>/columns`` [blocks, b] (-1: none).
    """
    kfac = KFACHessianApproximator(network, options.damping, 1, options.positions, generator, Wanted(layers))
    sweep(network, images, options.batch_size, [kfac], generator, progress)
    return kfac.stored(release=True)


def eliminations(network: nn.Module, groups: Groups, factors: Mapping[str, Tensor], damping: float,
                 fallback: Callable[[], Sequence[Tensor]] | None = None) -> dict[str, Tensor]:
    """H-OBS from the factors: ``hobs``, ``relative`` and, from whole output factors, ``kfac`` [channels of all groups].

    Args:
        network: whose weights are eliminated; untouched.
        groups: of the network.
        factors: of all consumers of free groups.
        damping: of the covariances, relative to their mean diagonal.
        fallback: gives scores per group [channels] for those that no consumer has factors of; called where needed.

    Raises:
        UserError: a group needs the fallback, and there is none.
    """
    analysis = analyse(network, groups, factors, damping, fallback)
    found = {name: torch.cat(scores) for name, scores in analysis.scores.items() if scores}
    found["relative"] = torch.cat([elimination.relative for elimination in analysis.eliminations])
    return _float(found)


def gate_scores(network: nn.Module, groups: Groups, true: Tensor, sampled: Tensor) -> dict[str, Tensor]:
    """Scores of weights and of gate gradients: ``l1``, ``taylor``, ``fisher``, ``signed`` [channels of all groups]."""
    return _float({"l1": torch.cat(filter_norms(network, groups, 1)), "taylor": taylor_score(true, TAYLOR_BATCH),
                   "fisher": fisher_score(sampled), "signed": signed_score(true, sampled)})


def consumer_layers(groups: Groups) -> dict[str, Tensor | None]:
    """Consumers of the groups that may shrink, with the channel of each of their inputs; opaque ones left out."""
    free = {member.layer for group in groups if not group.protected for member in group.with_role("consumer")}
    return {name: channels for name, channels in Gates(groups).lookup.items()
            if name in free and name not in groups.opaque}


def every_layer(network: nn.Module, groups: Groups) -> dict[str, Tensor | None]:
    """All layers that patches are known of, as :func:`consumer_layers`."""
    channels = Gates(groups).lookup
    return {name: channels.get(name) for name, layer in network.named_modules()
            if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)) and name not in groups.opaque}


def refuse_nothing(network: nn.Module, groups: Groups) -> None:
    """Raises a :class:`UserError` where no group may shrink."""
    if all(group.protected for group in groups):
        why = "; ".join(f"{group.name}: {group.protected}" for group in groups) or "no channels lie between two layers"
        raise UserError(f"{type(network).__name__}: nothing to prune ({why})")


def _float(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: score.float().contiguous() for name, score in scores.items()}

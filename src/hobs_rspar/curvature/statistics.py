"""All statistics that methods use, from one set of calibration images: what the sensitivity stage stores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms
from hobs_rspar.curvature.filters import FilterMoments, filter_scores
from hobs_rspar.curvature.gates import GateGradients, Gates, fisher_score, relabelled, signed_score, taylor_score
from hobs_rspar.curvature.hobs import analyse
from hobs_rspar.curvature.kfac import KFACHessianApproximator
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
    if all(group.protected for group in groups):
        why = "; ".join(f"{group.name}: {group.protected}" for group in groups) or "no channels lie between two layers"
        raise UserError(f"{type(network).__name__}: nothing to prune ({why})")
    gates = Gates(groups)
    seen, moments = GateGradients(network, gates, len(images)), FilterMoments(network, groups)
    kfac = KFACHessianApproximator(network, options.damping, 1, options.positions, generator)
    labels = sweep(network, images, options.batch_size, [seen, moments, kfac], generator, progress)
    sampled = seen.rows
    true = relabelled(network, gates, images, options.batch_size, sampled, labels)
    factors = kfac.stored()
    analysis = analyse(network, groups, factors, options.damping)
    scores = {"l1": torch.cat(filter_norms(network, groups, 1)), "taylor": taylor_score(true, TAYLOR_BATCH),
              "fisher": fisher_score(sampled), "signed": signed_score(true, sampled),
              "kfac": torch.cat(analysis.scores["kfac"]), "hobs": torch.cat(analysis.scores["hobs"]),
              "relative": torch.cat([elimination.relative for elimination in analysis.eliminations]),
              **filter_scores(groups, moments, factors, options.damping)}
    found = {name: score.float().contiguous() for name, score in scores.items()}
    return {"true_rows": true, "sampled_rows": sampled, **found}, factors

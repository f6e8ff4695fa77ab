"""All statistics that methods use, from one set of calibration images: what the sensitivity stage stores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms
from hobs_rspar.curvature.gates import Gates, fisher_score, gate_gradients, taylor_score
from hobs_rspar.curvature.hobs import analyse, collect_factors
from hobs_rspar.data import Images
from hobs_rspar.errors import UserError

SCORES = ("l1", "taylor", "fisher", "kfac", "hobs")


def collect(network: nn.Module, groups: Groups, images: Images, options, generator: torch.Generator,
            progress=lambda batches: batches) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gate statistics, scores and Kronecker factors.

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
        ``<layer>/g``. All float32 on the CPU.

    Raises:
        UserError: there are no groups, or all are kept whole.
    """
    if all(group.protected for group in groups):
        why = "; ".join(f"{group.name}: {group.protected}" for group in groups) or "no channels lie between two layers"
        raise UserError(f"{type(network).__name__}: nothing to prune ({why})")
    gate = Gates(groups)
    found = {"true_rows": gate_gradients(network, gate, images, options.batch_size),
             "sampled_rows": gate_gradients(network, gate, images, options.batch_size, generator)}
    factors = collect_factors(network, images, options, generator, progress)
    analysis = analyse(network, groups, factors, options.damping)
    found |= {"l1": torch.cat(filter_norms(network, groups, 1)), "taylor": taylor_score(found["true_rows"], 64),
              "fisher": fisher_score(found["sampled_rows"]), "kfac": torch.cat(analysis.scores["kfac"]),
              "hobs": torch.cat(analysis.scores["hobs"]),
              "relative": torch.cat([elimination.relative for elimination in analysis.eliminations])}
    return {name: value.float().contiguous() for name, value in found.items()}, factors

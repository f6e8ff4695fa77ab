"""What methods share that learn gates while they train: sampled gates, their MACs, batches, and the plan at the end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.allocation.space import Space
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.data import Images, random_crops
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.training import autocast


def sampled(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """Gates, each 0 or 1, by Gumbel-sigmoid with the straight-through gradient (Jang et al. 2017).

    Args:
        logits: of the gates being open [channels].
        temperature: of the sigmoid; a small one is nearly a step.
        random: draws the logistic noise, on the CPU.
    """
    noise = torch.rand(logits.shape, generator=random).clamp(1e-6, 1 - 1e-6).logit().to(logits.device)
    soft = torch.sigmoid((logits + noise) / temperature)
    return (soft > 0.5).to(soft) + (soft - soft.detach())


class Macs:
    """MACs of gates, differentiable.

    Args:
        groups: of the dense network.
        device: of the gates.
    """

    def __init__(self, groups: Groups, device: torch.device):
        linear, quadratic = (torch.tensor(part / groups.dense_macs, dtype=torch.float32, device=device)
                             for part in groups.polynomial)
        self.linear, self.quadratic, self.sizes = linear, quadratic, groups.sizes.tolist()
        self.whole = torch.tensor([bool(group.protected) for group in groups for _ in range(group.channels)],
                                  device=device)

    def ratio(self, gates: Tensor) -> Tensor:
        """Kept fraction of the dense MACs with gates [channels]."""
        removed = torch.stack([(1 - part).sum() for part in gates.split(self.sizes)])
        return 1 - removed @ self.linear + removed @ self.quadratic @ removed

    def overshoot(self, gates: Tensor, budget: float) -> Tensor:
        """log(max(MACs, budget) / budget), the regulariser of SANP and of BilevelPruning's family."""
        return (self.ratio(gates).clamp_min(budget) / budget).log()

    def opened(self, gates: Tensor) -> Tensor:
        """The gates, those of protected groups open."""
        return torch.where(self.whole, 1.0, gates)


def batches(images: Images, size: int, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches without end, flipped and shifted as in recovery; every pass is shuffled anew."""
    order = torch.randperm(len(images), generator=random)
    while True:
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(images), generator=random)])
        index, order = order[:size].to(images.pixels.device), order[size:]
        crops = random_crops(images.pixels[index], images.pixels.shape[-1], True, random)
        yield images.normalised(crops), images.labels[index]


def loss_under(network: nn.Module, gates: Gates, value: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of a batch with gates [channels]."""
    x, labels = batch
    with gates.applied(network, value[None]), autocast(x.device, "bf16"):
        out = network(x).float()
    return F.cross_entropy(out, labels)


def planned(context: Context, logits: Tensor, network: nn.Module, images: int, decided_by: str) -> PruningPlan:
    """The plan of the likeliest gates: widths in proportion to how many are open, projected on the budget.

    Args:
        context: of the method.
        logits: of all gates [channels].
        network: as the method trained it.
        images: that it trained on.
        decided_by: criterion and allocator in words.
    """
    parts = list(logits.detach().cpu().double().split(context.groups.sizes.tolist()))
    space = Space(context.groups, context.budget, context.min_ratio, context.tolerance)
    open_share = torch.stack([(part > 0).double().mean() for part in parts]).clamp_min(context.min_ratio)
    widths = space.project(open_share.numpy()[None])[0]
    return context.keep_best(parts, widths, decided_by, trained=network, images=images)

"""What methods share that learn gates while they train: sampled gates, their MACs, and the plan at the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.coupling import Groups
from hobs_rspar.curvature.gates import Gates
from hobs_rspar.data import Images
from hobs_rspar.device import autocast
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import Above, TrainingOptions, batches
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate

TEMPERATURE, OPEN = 0.4, 3.0  # of the Gumbel-sigmoid, and the first logits: gates begin open


class Options(TrainingOptions):
    """Options of a training of weights and gates; params.yaml says what each is for."""

    gate_rate: Above = 0.1


def sampled(logits: Tensor, random: torch.Generator) -> Tensor:
    """Gates, each 0 or 1, by Gumbel-sigmoid with the straight-through gradient (Jang et al. 2017).

    Args:
        logits: of the gates being open [channels].
        random: draws the logistic noise, on the CPU.
    """
    noise = torch.rand(logits.shape, generator=random).clamp(1e-6, 1 - 1e-6).logit().to(logits.device)
    soft = torch.sigmoid((logits + noise) / TEMPERATURE)
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


def loss_under(network: nn.Module, gates: Gates, value: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross entropy of a batch with gates [channels]."""
    x, labels = batch
    with gates.applied(network, value[None]), autocast(x.device):
        out = network(x).float()
    return F.cross_entropy(out, labels)


def alternate(network: nn.Module, context: Context, options: Options, parameters: list[Tensor],
              value: Callable[[], Tensor], penalty: Callable[[Tensor], Tensor], upper: Images) -> int:
    """Steps of the gates' parameters by Adam, and of the weights under the same gates by SGD, in turns.

    Args:
        network: the dense network's copy; its weights are trained on training images.
        context: of the method.
        options: of the training.
        parameters: of the gates.
        value: gives the gates [channels], differentiable in the parameters.
        penalty: what the gates' steps minimise beside the loss.
        upper: images of the gates' steps.

    Returns:
        The images seen by both.
    """
    gates, macs = Gates(context.groups), Macs(context.groups, parameters[0].device)
    descent, adam = SGD(network, options, {}), torch.optim.Adam(parameters, lr=options.gate_rate)
    above, below = (batches(images, options.batch_size, context.generator) for images in (upper, context.train))
    for step in bar(range(options.steps), context.method):
        network.eval()
        now = macs.opened(value())
        adam.zero_grad()
        (loss_under(network, gates, now, next(above)) + penalty(now)).backward()
        adam.step()
        network.zero_grad()
        network.train()
        with wide_batchnorm(network):
            loss_under(network, gates, now.detach(), next(below)).backward()
        descent.step(learning_rate(options, step, options.steps))
    network.eval()
    return 2 * options.steps * options.batch_size


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
    open_share = torch.stack([(part > 0).double().mean() for part in parts]).clamp_min(context.space.min_ratio)
    widths = context.space.project(open_share.numpy()[None])[0]
    return context.keep_best(parts, widths, decided_by, trained=network, images=images)

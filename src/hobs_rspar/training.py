"""The one training loop, of pretraining and of recovery: resumable after a kill, and the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.data import Images, random_crops
from hobs_rspar.errors import UserError
from hobs_rspar.folding import folded
from hobs_rspar.seeds import generator


@dataclass
class Task:
    """What is trained, on what, and how.

    Attributes:
        network: changed in place.
        train: training images.
        validation: images of the accuracy after each epoch; no choice is made with them here.
        recipe: ``params.pretrain`` or ``params.finetune``.
        seed: of order, crops and flips.
        stage: its name, which seeds the generators, too.
        teacher: the dense network where ``recipe.distillation`` is on.
        progress: called after every step with the number of images done.
    """

    network: nn.Module
    train: Images
    validation: Images
    recipe: object
    seed: int
    stage: str
    teacher: nn.Module | None = None
    progress: Callable[[int], None] = field(default=lambda images: None)


@dataclass
class State:
    """Everything that an interrupted run needs to go on: what is saved after each epoch."""

    epoch: int = 0
    history: list[dict] = field(default_factory=list)
    momentum: dict[str, Tensor] = field(default_factory=dict)


def autocast(device: torch.device, precision: str):
    """bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def logits(network: nn.Module, images: Images, precision: str = "fp32", batch_size: int = 500) -> Tensor:
    """Logits [N, classes] of all images in evaluation mode, as float32 on the CPU; batch norms are folded for it."""
    training, device = network.training, images.pixels.device
    network.eval()
    with folded(network, images.normalised(images.pixels[:1])), autocast(device, precision), torch.inference_mode():
        out = torch.cat([network(x).float() for x, _ in images.batches(batch_size)])
    network.train(training)
    return out.cpu()


def accuracy(out: Tensor, labels: Tensor, top: int = 1) -> float:
    """Top-k accuracy in percent."""
    hits = (out.topk(min(top, out.shape[1]), 1).indices == labels.cpu()[:, None]).any(1)
    return 100 * hits.double().mean().item()


def learning_rate(recipe, step: int, steps: int) -> float:
    """One-cycle schedule: a linear rise over ``warmup`` of the steps, then half a cosine down to zero."""
    rise = max(1, round(recipe.warmup * steps))
    if step < rise:
        return recipe.learning_rate * (step + 1) / rise
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def optimizer(network: nn.Module, recipe) -> torch.optim.SGD:
    """SGD with Nesterov momentum; no weight decay on biases and batch norms."""
    decayed = [p for p in network.parameters() if p.dim() > 1]
    plain = [p for p in network.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def fit(task: Task, state: State, save: Callable[[State], None]) -> State:
    """Trains from ``state.epoch`` to the recipe's last epoch.

    Args:
        task: see :class:`Task`.
        state: a fresh ``State()``, or the one that was saved last.
        save: called after each epoch, to make it resumable.

    Returns:
        The final state; ``task.network`` is trained, in evaluation mode.

    Raises:
        UserError: the loss is not finite.
    """
    recipe = task.recipe
    torch.set_num_threads(recipe.threads)
    task.network.to(memory_format=torch.channels_last).train()
    sgd = optimizer(task.network, recipe)
    names = {id(parameter): name for name, parameter in task.network.named_parameters()}
    for name, parameter in task.network.named_parameters():
        if name in state.momentum:
            sgd.state[parameter]["momentum_buffer"] = state.momentum[name].to(parameter.device)
    for epoch in range(state.epoch, recipe.epochs):
        with wide_batchnorm(task.network):
            loss = _epoch(task, sgd, epoch)
        state.epoch = epoch + 1
        state.history.append(_record(task, epoch, loss))
        state.momentum = {names[id(p)]: sgd.state[p]["momentum_buffer"] for group in sgd.param_groups
                          for p in group["params"] if "momentum_buffer" in sgd.state[p]}
        save(state)
    task.network.eval()
    return state


def steps_per_epoch(images: int, recipe) -> int:
    """Whole batches only, so that batch norm never sees a tiny one."""
    return max(1, images // recipe.batch_size)


def _epoch(task: Task, sgd: torch.optim.SGD, epoch: int) -> float:
    """One pass; its random numbers depend on (seed, stage, epoch) alone, so a resumed run draws the same ones."""
    recipe, train = task.recipe, task.train
    random = generator(task.seed, f"{task.stage}/epoch {epoch}")
    order = torch.randperm(len(train), generator=random)
    crop = recipe.crops[epoch] if recipe.crops else train.pixels.shape[-1]
    steps = steps_per_epoch(len(train), recipe)
    total = torch.zeros((), device=train.pixels.device)
    for step in range(steps):
        index = order[step * recipe.batch_size:(step + 1) * recipe.batch_size].to(train.pixels.device)
        x = train.normalised(random_crops(train.pixels[index], crop, recipe.flip, random))
        for group in sgd.param_groups:
            group["lr"] = learning_rate(recipe, epoch * steps + step, recipe.epochs * steps)
        loss = _loss(task, x, train.labels[index])
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        total += loss.detach()
        task.progress(len(index))
        if step % 50 == 0 or step == steps - 1:  # a check costs a synchronisation on a GPU
            _require_finite(total, task.stage, epoch, step)
    return total.item() / steps


def _loss(task: Task, x: Tensor, labels: Tensor) -> Tensor:
    with autocast(x.device, task.recipe.precision):
        out = task.network(x).float()
    loss = F.cross_entropy(out, labels)
    if task.teacher is None:
        return loss
    weight, temperature = task.recipe.distillation.weight, task.recipe.distillation.temperature
    with torch.inference_mode(), autocast(x.device, task.recipe.precision):
        target = task.teacher(x).float()
    soft = F.kl_div(F.log_softmax(out / temperature, 1), F.softmax(target.clone() / temperature, 1),
                    reduction="batchmean")
    return (1 - weight) * loss + weight * temperature**2 * soft


def _require_finite(loss: Tensor, stage: str, epoch: int, step: int) -> None:
    if not torch.isfinite(loss):
        section = stage.split("/")[0]
        raise UserError(f"{stage}: the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}; lower "
                        f"{section}.learning_rate in params.yaml, or set {section}.precision to fp32. Epochs before "
                        "this one are kept")


def _record(task: Task, epoch: int, loss: float) -> dict:
    out, labels = logits(task.network, task.validation, task.recipe.precision), task.validation.labels.cpu()
    steps = steps_per_epoch(len(task.train), task.recipe)
    validation_loss = F.cross_entropy(out, labels)
    _require_finite(validation_loss, task.stage, epoch, steps - 1)
    return {"epoch": epoch + 1, "images": (epoch + 1) * steps * task.recipe.batch_size, "train_loss": loss,
            "validation_loss": validation_loss.item(), "validation_top1": accuracy(out, labels)}

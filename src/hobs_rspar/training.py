"""The one training loop, of pretraining and of recovery: resumable after a kill, and the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.sgd import sgd

from hobs_rspar.batchnorm import wide_batchnorm
from hobs_rspar.data import Images, random_crops
from hobs_rspar.device import autocast
from hobs_rspar.errors import UserError
from hobs_rspar.folding import folded
from hobs_rspar.seeds import generator
from hobs_rspar.strided import sliced
from hobs_rspar.teaching import Teach, answers


@dataclass
class Task:
    """What is trained, on what, and how.

    Attributes:
        network: changed in place.
        train: training images; an epoch draws ``recipe.images`` of them anew (None: all), without repetition.
        validation: images of the accuracy after each epoch; no choice is made with them here.
        recipe: ``params.pretrain`` or ``params.finetune``.
        seed: of order, crops and flips.
        stage: its name, which seeds the generators, too.
        teacher: the dense network where ``recipe.distillation`` is on.
        lessons: folder of the teacher's answers to this recipe and seed, shared by all networks that learn from it;
            None: they are not kept.
        progress: called after every step with the number of images done.
    """

    network: nn.Module
    train: Images
    validation: Images
    recipe: object
    seed: int
    stage: str
    teacher: nn.Module | None = None
    lessons: Path | None = None
    progress: Callable[[int], None] = field(default=lambda images: None)

    @property
    def steps(self) -> int:
        """Steps of an epoch: whole batches only, so that batch norm never sees a tiny one."""
        return max(1, min(self.recipe.images or len(self.train), len(self.train)) // self.recipe.batch_size)


@dataclass
class State:
    """Everything that an interrupted run needs to go on: what is saved after each epoch."""

    epoch: int = 0
    history: list[dict] = field(default_factory=list)
    momentum: dict[str, Tensor] = field(default_factory=dict)


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


class SGD:
    """Stochastic gradient descent with Nesterov momentum; no weight decay on biases and batch norms.

    PyTorch's step by its functional form: the class around it imports the compiler, 1.4 s of every process.

    Args:
        network: its parameters are changed.
        recipe: ``params.pretrain`` or ``params.finetune``.
        momentum: name of a parameter to its buffer, of the run that is continued; {} for a new one.
    """

    def __init__(self, network: nn.Module, recipe, momentum: dict[str, Tensor]):
        named = dict(network.named_parameters())
        self.recipe = recipe
        self.momentum = {name: momentum[name].to(p.device) for name, p in named.items() if name in momentum}
        self.groups = [(recipe.weight_decay, {name: p for name, p in named.items() if p.dim() > 1}),
                       (0.0, {name: p for name, p in named.items() if p.dim() <= 1})]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One step along the gradients, which are used up."""
        factor = self.recipe.momentum
        for decay, named in self.groups:
            used = {name: p for name, p in named.items() if p.grad is not None}
            buffers = [self.momentum.get(name) for name in used]
            sgd([*used.values()], [p.grad for p in used.values()], buffers, weight_decay=decay, momentum=factor,
                lr=rate, dampening=0.0, nesterov=factor > 0, maximize=False)
            self.momentum |= {name: buffer for name, buffer in zip(used, buffers) if buffer is not None}
            for p in used.values():
                p.grad = None


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
    descent = SGD(task.network, recipe, state.momentum)
    for epoch in range(state.epoch, recipe.epochs):
        with sliced(task.network), wide_batchnorm(task.network), _lesson(task, epoch) as teach:
            loss = _epoch(task, descent, epoch, teach)
        state.epoch = epoch + 1
        state.history.append(_record(task, epoch, loss))
        state.momentum = descent.momentum
        save(state)
    task.network.eval()
    return state


def _lesson(task: Task, epoch: int) -> AbstractContextManager[Teach | None]:
    """The teacher's answers of an epoch; None without a teacher."""
    if task.teacher is None:
        return nullcontext()
    kept = None if task.lessons is None else task.lessons / f"{epoch}.safetensors"
    image = task.train.normalised(task.train.pixels[:1])
    return answers(task.teacher, task.recipe.precision, image, task.steps, kept)


def _epoch(task: Task, descent: SGD, epoch: int, teach: Teach | None) -> float:
    """One pass; its random numbers depend on (seed, stage, epoch) alone, so a resumed run draws the same ones."""
    recipe, train = task.recipe, task.train
    random = generator(task.seed, f"{task.stage}/epoch {epoch}")
    order = torch.randperm(len(train), generator=random)
    crop = recipe.crops[epoch] if recipe.crops else train.pixels.shape[-1]
    steps = task.steps
    total = torch.zeros((), device=train.pixels.device)
    for step in range(steps):
        index = order[step * recipe.batch_size:(step + 1) * recipe.batch_size].to(train.pixels.device)
        x = train.normalised(random_crops(train.pixels[index], crop, recipe.flip, random))
        loss = _loss(task, x, train.labels[index], teach and teach(x))
        loss.backward()
        descent.step(learning_rate(recipe, epoch * steps + step, recipe.epochs * steps))
        total += loss.detach()
        task.progress(len(index))
        if step % 50 == 0 or step == steps - 1:  # a check costs a synchronisation on a GPU
            _require_finite(total, task.stage, epoch, step)
    return total.item() / steps


def _loss(task: Task, x: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
    """Cross entropy; mixed with the divergence from a teacher's logits ``target``, as Hinton et al. 2015."""
    with autocast(x.device, task.recipe.precision):
        out = task.network(x).float()
    loss = F.cross_entropy(out, labels)
    if target is None:
        return loss
    weight, temperature = task.recipe.distillation.weight, task.recipe.distillation.temperature
    soft = F.kl_div(F.log_softmax(out / temperature, 1), F.softmax(target / temperature, 1), reduction="batchmean")
    return (1 - weight) * loss + weight * temperature**2 * soft


def _require_finite(loss: Tensor, stage: str, epoch: int, step: int) -> None:
    if not torch.isfinite(loss):
        section = stage.split("/")[0]
        raise UserError(f"{stage}: the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}; lower "
                        f"{section}.learning_rate in params.yaml, or set {section}.precision to fp32. Epochs before "
                        "this one are kept")


def _record(task: Task, epoch: int, loss: float) -> dict:
    out, labels = logits(task.network, task.validation, task.recipe.precision), task.validation.labels.cpu()
    validation_loss = F.cross_entropy(out, labels)
    _require_finite(validation_loss, task.stage, epoch, task.steps - 1)
    return {"epoch": epoch + 1, "images": (epoch + 1) * task.steps * task.recipe.batch_size, "train_loss": loss,
            "validation_loss": validation_loss.item(), "validation_top1": accuracy(out, labels)}

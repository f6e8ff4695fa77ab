"""AutoCompress: annealing of the layers' ratios, ADMM towards the widths that it found, purification; in rounds.

Paper: Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework for Ultra-High Compression Rates, AAAI
2020 (code in NNI). Faithful: three rounds, each with its share of the budget; in each, simulated annealing over the
layers' ratios (temperature 100 to 20, times 0.9, a change of up to 0.35 that shrinks with it), paid by accuracy on
held-out images with the smallest filters gone; ADMM, which minimises the loss + rho/2 |W - Z + U|^2 with Z the nearest
weights of those widths; removal of what ADMM drove to zero, and purification: filters that are next to nothing beside
their layer's largest go, too. Simplified: filters only (the paper removes columns as well, which needs sparse kernels);
one short epoch of ADMM in all in place of 450 (counted and shown), with a larger rho to make up for it; batch norms are
re-estimated before a plan is run, since nothing would be right otherwise; coupled channels are one filter; ratios are
projected on the budget. Published: ResNet-18 on CIFAR-10 93.81 % at 12.2x, VGG-16 93.21 % at 8.8x fewer FLOPs, both
with columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar.allocation.environment import PruningEnvironment, affordable
from hobs_rspar.allocation.space import Space
from hobs_rspar.config import Positive
from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms, places_of, weights
from hobs_rspar.methods._protocol import Context
from hobs_rspar.methods._trained import Above, TrainingOptions, batches, close, training_loss
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar
from hobs_rspar.training import SGD, learning_rate

HOT, COLD, COOLING, CHANGE = 100.0, 20.0, 0.9, 0.35  # temperatures, in points of accuracy; a ratio's first change
PURE = 0.01  # of the layer's largest norm: filters below it go


class Options(TrainingOptions):
    """Options of annealing and ADMM; params.yaml says what each is for."""

    rounds: Positive = 3
    iterations: Positive = 4
    rho: Above = 0.011
    learning_rate: Above = 0.048
    held_out: Positive = 1024


def plan(context: Context, options: Options) -> PruningPlan:
    network, groups = copy.deepcopy(context.network), context.groups
    descent, data = SGD(network, options, {}), batches(context.train, options.batch_size, context.generator)
    random, searched = np.random.default_rng(context.derived_seed), []
    for turn, steps in enumerate(np.array_split(np.arange(options.steps), options.rounds), 1):
        searched.append(evaluated(network, context, options))
        widths = annealed(share(context.space, turn, options.rounds), searched[-1], random)
        admm = Admm(network, groups, widths, options.rho)
        for place, step in enumerate(bar(steps.tolist(), f"autocompress, round {turn}")):
            if place % max(1, len(steps) // options.iterations) == 0:
                admm.update()
            training_loss(network, next(data)).backward()
            admm.pull()
            descent.step(learning_rate(options, step, options.steps))
        network.eval()
        remove(network, groups, widths)
    history = {"evaluations": sum(each.evaluations for each in searched),
               "images": sum(each.images for each in searched), "episodes": [], "measured": [],
               "chosen": "highest accuracy that annealing met in the last round"}
    return context.keep_best(filter_norms(network, groups, 2), widths, "L2 norm after ADMM, annealing (AutoCompress)",
                             search=history, trained=network, images=options.steps * options.batch_size)


def share(space: Space, turn: int, rounds: int) -> Space:
    """The budget of a round, so that each keeps the same fraction of what is left; only the last must meet it."""
    return replace(space, budget=space.budget ** (turn / rounds), tolerance=space.tolerance if turn == rounds else 1.0)


def evaluated(network: nn.Module, context: Context, options: Options) -> PruningEnvironment:
    """Pays widths by the accuracy of ``network`` on validation images with its smallest filters gone."""
    order = [torch.argsort(norm, stable=True) for norm in filter_norms(network, context.groups, 1)]
    return PruningEnvironment(network, context.groups, order, {}, affordable(context.calibration, 256, 1 / 4),
                              affordable(context.validation, options.held_out), refit=False)


def annealed(space: Space, environment: PruningEnvironment, random: np.random.Generator) -> np.ndarray:
    """The widths [groups] of highest accuracy that a chain from uniform widths meets."""
    here = best = space.uniform
    accuracy = highest = 100 * environment.evaluate(here).accuracy
    temperature = HOT
    while temperature > COLD:
        change = random.uniform(-1, 1, len(here)) * CHANGE * temperature / HOT
        there = space.project((here / space.sizes + change).clip(0.01, 1)[None])[0]
        found = 100 * environment.evaluate(there).accuracy
        if found >= accuracy or random.random() < np.exp((found - accuracy) / temperature):
            here, accuracy = there, found
        if found > highest:
            best, highest = there, found
        temperature *= COOLING
    return best


class Admm:
    """Alternating direction method of multipliers: pulls filters towards weights Z of given widths.

    Args:
        network: its producers' weights W are pulled.
        groups: of the network.
        widths: filters that stay in every group [groups].
        rho: weight of the pull.
    """

    def __init__(self, network: nn.Module, groups: Groups, widths: np.ndarray, rho: float):
        self.network, self.groups, self.widths, self.rho = network, groups, widths, rho
        self.u = {name: torch.zeros_like(weight) for name, weight in self._weights(network)}
        self.z: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Z becomes the point of these widths nearest to W + U; U grows by what then remains between W and Z."""
        nearest = copy.deepcopy(self.network)
        for name, weight in self._weights(nearest):
            weight += self.u[name]
        for name, weight in nearest_of_widths(nearest, self.groups, self.widths):
            self.z[name] = weight
        for name, weight in self._weights(self.network):
            self.u[name] += weight - self.z[name]

    def pull(self) -> None:
        """Adds the gradient rho (W - Z + U)."""
        for name, weight in self._weights(self.network):
            if weight.grad is not None:  # a frozen weight has none
                weight.grad += self.rho * (weight.detach() - self.z[name] + self.u[name])

    def _weights(self, network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """Producers of the groups that may shrink."""
        names = {member.layer for group in self.groups if not group.protected
                 for member in group.with_role("producer", "depthwise")}
        return ((name, network.get_submodule(name).weight) for name in sorted(names))


@torch.no_grad()
def nearest_of_widths(network: nn.Module, groups: Groups, widths: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """Zeroes the filters of least norm beyond ``widths``, in place; the producers' weights by name."""
    for group, norm, width in zip(groups, filter_norms(network, groups, 2), widths):
        gone = torch.argsort(norm, stable=True)[:group.channels - int(width)].tolist()
        for member in group.with_role("producer", "depthwise") if not group.protected else ():
            for weight, axis, places in weights(network, member):
                weight.index_fill_(axis, places_of(places, gone, weight.device), 0)
            yield member.layer, network.get_submodule(member.layer).weight.detach()


def remove(network: nn.Module, groups: Groups, widths: Sequence[int]) -> None:
    """Closes the filters of least norm beyond ``widths``, and those that are next to nothing."""
    for group, norm, width in zip(groups, filter_norms(network, groups, 2), widths):
        order = torch.argsort(norm, stable=True)
        count = max(group.channels - int(width), int((norm < PURE * norm.max()).sum()))
        close(network, group, order[:0 if group.protected else count].tolist())

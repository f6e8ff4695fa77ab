"""AMC: a DDPG agent walks through the layers, chooses how much of each stays, and is paid for accuracy.

Paper: He et al., AMC: AutoML for Model Compression and Acceleration on Mobile Devices, ECCV 2018 (and the authors'
code). Faithful: the eleven features of a layer (place, outputs, inputs, height, width, stride, kernel, MACs, MACs
removed so far, MACs left, last action); the action wall, which bounds an action so that later layers can still meet
the budget; the largest filters stay, consumers are refitted by least squares; reward -error on held-out images, the
same for every step, less a moving average; DDPG with two hidden layers of 300, noise 0.5 that shrinks by 0.95 an
episode after random ones, no discount. Simplified: a hundred episodes in place of 800, so that a search takes half a
minute, and a faster learning rate of the actor for it; coupled channels are one layer; L1 norms; widths are completed
to the budget by single channels. Published: ResNet-56 on CIFAR-10 92.8 to 91.9 % at 50 %, MobileNetV2 on ImageNet
70.85 % at 70 %.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hobs_rspar.allocation.environment import PruningEnvironment, affordable
from hobs_rspar.allocation.sac import perceptron
from hobs_rspar.config import Positive, Section
from hobs_rspar.coupling import Group
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar

HIDDEN, MINIBATCH, FOLLOW = 300, 64, 0.01
ACTOR_RATE, CRITIC_RATE = 1e-3, 1e-3  # the authors' actor has 1e-4, over eight times as many episodes
NOISE, SHRINK, AVERAGE = 0.5, 0.95, 0.95


class Options(Section):
    """Options of the search; params.yaml says what each is for."""

    episodes: Positive = 100
    random: Positive = 20
    images: Positive = 1024


def plan(context: Context, options: Options) -> PruningPlan:
    norms = filter_norms(context.network, context.groups, 1)
    order = [torch.argsort(norm, stable=True) for norm in norms]
    environment = PruningEnvironment(context.network, context.groups, order, context.factors,
                                     affordable(context.calibration, 256, 1 / 4),
                                     affordable(context.validation, options.images))
    widths = search(Layers(context), environment, options, context.derived_seed)
    history = {"evaluations": environment.evaluations, "images": environment.images, "episodes": [], "measured": [],
               "chosen": "highest accuracy of all episodes"}
    ranks = [torch.argsort(channels) for channels in order]
    return context.keep_best(ranks, widths, "L1 norm, DDPG (AMC)", repair="least_squares", search=history)


def search(layers: Layers, environment: PruningEnvironment, options: Options, seed: int) -> np.ndarray:
    """The widths [groups] of the best episode."""
    agent, random = Agent(seed), np.random.default_rng(seed)
    best, highest, average = layers.space.uniform, -np.inf, None
    for episode in bar(range(options.episodes), "amc"):
        noise = None if episode < options.random else NOISE * SHRINK ** (episode - options.random)
        widths, states, actions = walk(layers, agent, noise, random)
        reward = environment.evaluate(widths).accuracy - 1
        if reward > highest:
            best, highest = widths, reward
        average = reward if average is None else AVERAGE * average + (1 - AVERAGE) * reward
        agent.remember(states, actions, reward - average)
        for _ in range(len(actions) if episode >= options.random else 0):
            agent.learn()
    return best


def walk(layers: Layers, agent: Agent, noise: float | None,
         random: np.random.Generator) -> tuple[np.ndarray, Tensor, Tensor]:
    """One episode: widths [groups] that meet the budget, states [groups, 11], actions [groups] as carried out."""
    widths, states, actions = layers.space.sizes.copy(), [], [1.0]
    for place in range(len(widths)):
        states.append(layers.state(place, widths, actions[-1]))
        wanted = random.uniform() if noise is None else float(np.clip(agent.act(states[-1]) + noise * random.normal(),
                                                                      0, 1))
        widths[place] = layers.walled(place, widths, wanted)
        actions.append(float(widths[place] / layers.space.sizes[place]))
    met = layers.space.complete(widths[None].astype(float))[0]
    return met, torch.tensor(np.stack(states), dtype=torch.float32), torch.tensor(actions[1:])


class Layers:
    """What the agent sees of the groups, and what it may do.

    Args:
        context: of the method.
    """

    def __init__(self, context: Context):
        self.space, groups = context.space, context.groups
        rows = np.array([self._shape(context.network, group, groups.layers) for group in groups], float)
        self.shapes = rows / rows.max(0).clip(1)

    def state(self, place: int, widths: np.ndarray, last: float) -> np.ndarray:
        """The eleven features of the layer at ``place`` [11], each at most 1.

        Args:
            place: which group.
            widths: chosen so far, later groups whole [groups].
            last: kept fraction of the group before.
        """
        removed, later = 1 - float(self.space.spent(widths)), widths.copy()
        later[place:] = self.space.low[place:]
        rest = float(self.space.spent(widths) - self.space.spent(later))
        return np.concatenate([[place / len(widths)], self.shapes[place], [removed, rest, last]])

    def walled(self, place: int, widths: np.ndarray, wanted: float) -> int:
        """The width nearest to a wanted kept ratio at which the layers to come, at their floors, still meet the budget.

        Args:
            place: which group.
            widths: chosen so far [groups].
            wanted: kept fraction.
        """
        low, size = int(self.space.low[place]), int(self.space.sizes[place])
        options = np.repeat(widths[None], size - low + 1, 0)
        options[:, place] = np.arange(low, size + 1)
        options[:, place + 1:] = self.space.low[place + 1:]
        allowed = options[self.space.expense.of(options) <= self.space.target, place]
        most = int(allowed.max()) if len(allowed) else low
        return int(np.clip(round(wanted * size), low, most))

    @staticmethod
    def _shape(network: nn.Module, group: Group, layers: dict) -> list[float]:
        """Outputs, inputs, height, width, stride, kernel and MACs of the group's first producer."""
        name = group.with_role("producer")[0].layer
        macs, outputs, inputs = layers[name]
        layer = network.get_submodule(name)
        kernel, stride = (getattr(layer, name, (1,))[0] for name in ("kernel_size", "stride"))
        edge = (macs / layer.weight.numel()) ** 0.5
        return [outputs, inputs, edge, edge, stride, kernel, macs]


class Agent:
    """Deep deterministic policy gradient (Lillicrap et al. 2016) with replay and targets.

    Args:
        seed: of the weights and of the minibatches.
    """

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.critic = perceptron(11, 1, HIDDEN), perceptron(12, 1, HIDDEN)
        self.targets = copy.deepcopy(nn.ModuleList([self.actor, self.critic]))
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=ACTOR_RATE)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=CRITIC_RATE)
        self.memory: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def act(self, state: np.ndarray) -> float:
        """Kept fraction for a state [11]."""
        return float(torch.sigmoid(self.actor(torch.tensor(state, dtype=torch.float32))))

    def remember(self, states: Tensor, actions: Tensor, reward: float) -> None:
        """Stores an episode: states [steps, 11], actions [steps]; every step is paid the same."""
        following = torch.cat([states[1:], states[-1:]])
        last = torch.zeros(len(actions)).index_fill(0, torch.tensor([len(actions) - 1]), 1.0)
        new = (states, actions, torch.full((len(actions),), float(reward)), following, last)
        self.memory = tuple(torch.cat(pair) for pair in zip(self.memory, new)) or new

    def learn(self) -> None:
        """One step of critic, actor and targets on a random minibatch."""
        index = torch.randint(len(self.memory[0]), (MINIBATCH,), generator=self.generator)
        states, actions, rewards, following, last = (part[index] for part in self.memory)
        actor, critic = self.targets
        with torch.no_grad():
            wanted = rewards + (1 - last) * valued(critic, following, torch.sigmoid(actor(following)[:, 0]))
        self.critic_optimizer.zero_grad()
        F.mse_loss(valued(self.critic, states, actions), wanted).backward()
        self.critic_optimizer.step()
        self.actor_optimizer.zero_grad()
        (-valued(self.critic, states, torch.sigmoid(self.actor(states)[:, 0])).mean()).backward()
        self.actor_optimizer.step()
        with torch.no_grad():
            for target, own in zip(self.targets.parameters(), [*self.actor.parameters(), *self.critic.parameters()]):
                target.lerp_(own, FOLLOW)


def valued(critic: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
    """What the critic expects of actions [n] in states [n, 11]: [n]."""
    return critic(torch.cat([states, actions[:, None]], 1))[:, 0]

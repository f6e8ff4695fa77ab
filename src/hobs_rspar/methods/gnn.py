"""GNN-Pruning, taken to be GNN-RL: a graph network reads the whole network as a graph and emits all ratios at once.

Paper: Yu et al., Topology-Aware Network Pruning using Multi-stage Graph Embedding and Reinforcement Learning, ICML
2022 (and the authors' code); the source documents name no authors, and this is the closest match. Faithful: the state
is an embedding of the network's graph by message passing; PPO emits the ratios of all layers in one step; the reward
is accuracy on held-out images within the budget; the filters with the largest L2 norm stay. Simplified: one graph,
whose nodes are groups of coupled channels joined where a layer reads one and writes the other, in place of their
hierarchy of operations; ratios are projected on the budget; batch norms are re-estimated before a plan is run, since
nothing would be right otherwise; a hundred and twenty plans in place of thousands. Published: ResNet-56 on CIFAR-10
93.59 % at 54 % fewer MACs, ResNet-50 on ImageNet 76.10 to 74.28 % at 53 %.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from hobs_rspar.allocation.environment import PruningEnvironment, affordable
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.walk import features
from hobs_rspar.config import Positive, Section
from hobs_rspar.coupling import Groups
from hobs_rspar.criteria import filter_norms
from hobs_rspar.methods._protocol import Context
from hobs_rspar.plan import PruningPlan
from hobs_rspar.progress import bar

HIDDEN, ROUNDS = 64, 3  # width of the embedding, rounds of message passing
RATE, CLIP, PASSES, ENTROPY = 3e-3, 0.2, 10, 1e-3
START = -1.0  # logarithm of the policy's first standard deviation


class Options(Section):
    """Options of the search; params.yaml says what each is for."""

    updates: Positive = 10
    episodes: Positive = 12
    images: Positive = 1024


def plan(context: Context, options: Options) -> PruningPlan:
    norms = filter_norms(context.network, context.groups, 2)
    order = [torch.argsort(norm, stable=True) for norm in norms]
    environment = PruningEnvironment(context.network, context.groups, order, context.factors,
                                     affordable(context.calibration, 256, 1 / 4),
                                     affordable(context.validation, options.images),
                                     refit=False)
    lesser = np.array([float(norm.sort().values[:len(norm) // 2].sum() / norm.sum().clamp_min(1e-30))
                       for norm in norms])
    widths = search(context.space, environment, lesser, options, context.derived_seed)
    history = {"evaluations": environment.evaluations, "images": environment.images, "episodes": [], "measured": [],
               "chosen": "highest accuracy of all episodes"}
    ranks = [torch.argsort(channels) for channels in order]
    return context.keep_best(ranks, widths, "L2 norm, graph network and PPO (GNN-RL)", search=history)


def search(space: Space, environment: PruningEnvironment, lesser: np.ndarray, options: Options,
           seed: int) -> np.ndarray:
    """The widths [groups] of the best episode.

    Args:
        space: allocations that meet the budget.
        environment: runs them.
        lesser: share of a group's norms in the smaller half of its channels [groups], a feature of its node.
        options: of the search.
        seed: of the agent.
    """
    nodes = torch.tensor(features(space, lesser), dtype=torch.float32)
    agent = Agent(nodes, adjacency(space.groups), float((space.uniform / space.sizes).mean()), seed)
    best, highest = space.uniform, environment.evaluate(space.uniform).accuracy
    for _ in bar(range(options.updates), "gnn"):
        raw = agent.draw(options.episodes)
        widths = space.project(torch.sigmoid(raw).double().numpy())
        paid = np.array([environment.evaluate(row).accuracy for row in widths])
        if paid.max() > highest:
            best, highest = widths[paid.argmax()], float(paid.max())
        agent.learn(raw, torch.tensor(paid, dtype=torch.float32))
    return best


def adjacency(groups: Groups) -> Tensor:
    """Groups that share a layer, one as its input and the other as its output, and themselves; rows sum to 1."""
    joined = torch.eye(len(groups))
    layers = [{member.layer for member in group.members if member.role != "norm"} for group in groups]
    for i, own in enumerate(layers):
        for j, other in enumerate(layers):
            joined[i, j] = float(bool(own & other))
    return joined / joined.sum(1, keepdim=True)


class Agent:
    """PPO of a one-step episode: Gaussians of all ratios before the sigmoid, and the value of the graph.

    Args:
        nodes: features of the groups [groups, features].
        edges: of the graph [groups, groups].
        ratio: that the untrained policy is centred on.
        seed: of the weights and of all samples.
    """

    def __init__(self, nodes: Tensor, edges: Tensor, ratio: float, seed: int):
        self.nodes, self.edges, self.generator = nodes, edges, torch.Generator().manual_seed(seed)
        self.centre = float(np.log(ratio / (1 - ratio))) if 0 < ratio < 1 else 3.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = GraphPolicy(nodes.shape[1])
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=RATE)

    def distribution(self) -> tuple[torch.distributions.Normal, Tensor]:
        """Of the actions [groups], and the value."""
        mean, value = self.policy(self.nodes, self.edges)
        return torch.distributions.Normal(mean + self.centre, self.policy.log_std.exp().expand_as(mean)), value

    @torch.no_grad()
    def draw(self, episodes: int) -> Tensor:
        """Actions before the sigmoid [episodes, groups]."""
        policy, _ = self.distribution()
        return policy.mean + policy.stddev * torch.randn(episodes, len(self.nodes), generator=self.generator)

    def learn(self, raw: Tensor, rewards: Tensor) -> None:
        """One update from episodes: actions [episodes, groups] and rewards [episodes]."""
        with torch.no_grad():
            before = self.distribution()[0].log_prob(raw)
        advantages = (rewards - rewards.mean()) / (rewards.std(unbiased=False) + 1e-8)
        for _ in range(PASSES):
            policy, value = self.distribution()
            ratio = (policy.log_prob(raw) - before).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            gain = torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None]).mean()
            self.optimizer.zero_grad()
            ((value - rewards.mean()).square() - gain - ENTROPY * policy.entropy().mean()).backward()
            self.optimizer.step()


class GraphPolicy(nn.Module):
    """Message passing over the groups, then a mean per group, and a value from the mean embedding."""

    def __init__(self, inputs: int):
        super().__init__()
        self.enter = nn.Linear(inputs, HIDDEN)
        self.messages = nn.ModuleList(nn.Linear(2 * HIDDEN, HIDDEN) for _ in range(ROUNDS))
        self.mean, self.value = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)
        self.log_std = nn.Parameter(torch.tensor(START))
        nn.init.zeros_(self.mean.weight)
        nn.init.zeros_(self.mean.bias)

    def forward(self, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.enter(nodes))
        for message in self.messages:
            state = torch.tanh(message(torch.cat([state, edges @ state], 1)))
        return self.mean(state)[:, 0], self.value(state.mean(0))[0]

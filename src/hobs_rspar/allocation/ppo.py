"""Proximal policy optimisation (Schulman et al. 2017) of the kept ratio of each group, one group after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hobs_rspar.errors import UserError


class ActorCritic(nn.Module):
    """Two separate networks of two hidden layers: mean of the action before the sigmoid, and value of the state."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.actor = self._network(inputs, hidden, gain=0.01)
        self.critic = self._network(inputs, hidden, gain=1.0)
        self.log_std = nn.Parameter(torch.tensor(math.log(0.5)))

    @staticmethod
    def _network(inputs: int, hidden: int, gain: float) -> nn.Sequential:
        layers = [nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)]
        for layer, scale in zip(layers, (math.sqrt(2), math.sqrt(2), gain)):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, states: Tensor) -> tuple[torch.distributions.Normal, Tensor]:
        """Distribution [...] of the action before the sigmoid, and values [...], of states [..., inputs]."""
        mean = self.actor(states)[..., 0]
        return torch.distributions.Normal(mean, self.log_std.exp().expand_as(mean)), self.critic(states)[..., 0]


@dataclass
class Rollout:
    """Steps since the last update; each entry holds one value per parallel episode [episodes] (or [1])."""

    states: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rewards: list[Tensor] = field(default_factory=list)


class RSPARAgent:
    """PPO agent that allocates budgets to layers.

    The action is a kept ratio in (0, 1): sigmoid(u + offset) of a Gaussian u, with the probability density that of u,
    so that nothing is clamped. The state is [features of the layer, ratios chosen so far (0 for later layers), accuracy
    drop].

    Args:
        num_layers: layers (groups) an episode allocates.
        layer_feature_dim: features per layer.
        hidden_dim: width of actor and critic.
        lr: Adam's learning rate.
        gamma: discount.
        gae_lambda: of generalised advantage estimation.
        clip: PPO's clipping range.
        entropy: weight of the entropy bonus.
        initial_ratio: kept ratio that the untrained policy is centred on.
        seed: of the weights and of all samples.
    """

    def __init__(self, num_layers: int, layer_feature_dim: int = 3, hidden_dim: int = 256, lr: float = 3e-4,
                 gamma: float = 0.99, *, gae_lambda: float = 0.95, clip: float = 0.2, entropy: float = 0.01,
                 initial_ratio: float = 0.5, seed: int = 0):
        self.num_layers, self.state_dim = num_layers, layer_feature_dim + num_layers + 1
        self.gamma, self.gae_lambda, self.clip, self.entropy = gamma, gae_lambda, clip, entropy
        initial_ratio = min(max(initial_ratio, 0.01), 0.99)  # the sigmoid never reaches 0 or 1
        self.offset = math.log(initial_ratio / (1 - initial_ratio))
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = ActorCritic(self.state_dim, hidden_dim)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr, fused=True)
        self.rollout = Rollout()

    @torch.no_grad()
    def select_action(self, state: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Kept ratio and the log-density of the choice.

        Args:
            state: [state_dim], or [episodes, state_dim] for parallel episodes.
            deterministic: take the policy's mean, and do not record the step.

        Returns:
            (action, log_prob), each a scalar or [episodes].
        """
        state = torch.as_tensor(state, dtype=torch.float32)
        if state.shape[-1] != self.state_dim:
            raise UserError(f"the state has {state.shape[-1]} values, expected {self.state_dim} = layer features + "
                            "num_layers ratios + accuracy drop")
        policy, value = self.policy(state)
        noise = torch.randn(policy.mean.shape, generator=self.generator)
        raw = policy.mean if deterministic else policy.mean + policy.stddev * noise
        log_prob = policy.log_prob(raw)
        if not deterministic:
            for kept, new in ((self.rollout.states, state), (self.rollout.actions, raw),
                              (self.rollout.log_probs, log_prob), (self.rollout.values, value)):
                kept.append(new)
        return torch.sigmoid(raw + self.offset), log_prob

    def observe(self, reward: Tensor | float) -> None:
        """Records the reward of the last recorded step, a scalar or [episodes]; an episode has num_layers steps."""
        self.rollout.rewards.append(torch.as_tensor(reward, dtype=torch.float32))

    def update_policy(self, batch_size: int = 64, epochs: int = 10) -> dict[str, float]:
        """One PPO update from all complete episodes recorded since the last one.

        Args:
            batch_size: steps a minibatch.
            epochs: passes over the steps.

        Returns:
            Mean ``policy_loss``, ``value_loss`` and ``entropy``.

        Raises:
            UserError: nothing, or an incomplete episode, has been recorded.
        """
        steps = len(self.rollout.rewards)
        if not steps or steps % self.num_layers or steps != len(self.rollout.actions):
            raise UserError(f"update_policy needs complete episodes of {self.num_layers} steps, each with "
                            f"select_action and observe; recorded: {len(self.rollout.actions)} actions, {steps} "
                            "rewards")
        states, actions, old, values, rewards = (torch.stack(part).reshape(steps // self.num_layers, self.num_layers,
                                                                           -1, *part[0].shape[1:])
                                                 for part in vars(self.rollout).values())
        advantages = self._advantages(rewards, values)
        flat = [part.reshape(-1, *part.shape[3:]) for part in (states.reshape(*actions.shape, -1), actions, old,
                                                               advantages, advantages + values)]
        flat[3] = (flat[3] - flat[3].mean()) / (flat[3].std(unbiased=False) + 1e-8)
        losses = []
        for _ in range(epochs):
            for index in torch.randperm(len(flat[1]), generator=self.generator).split(batch_size):
                losses.append(self._step(*(part[index] for part in flat)))
        self.rollout = Rollout()
        means = torch.tensor(losses).mean(0).tolist()
        return dict(zip(("policy_loss", "value_loss", "entropy"), means))

    def _advantages(self, rewards: Tensor, values: Tensor) -> Tensor:
        """Generalised advantage estimation (Schulman et al. 2016) along axis 1; episodes end after num_layers steps."""
        advantages, running = torch.zeros_like(values), torch.zeros_like(values[:, 0])
        for step in reversed(range(self.num_layers)):
            following = values[:, step + 1] if step + 1 < self.num_layers else torch.zeros_like(running)
            delta = rewards[:, step] + self.gamma * following - values[:, step]
            running = delta + self.gamma * self.gae_lambda * running
            advantages[:, step] = running
        return advantages

    def _step(self, states: Tensor, actions: Tensor, old: Tensor, advantages: Tensor, returns: Tensor) -> list[float]:
        policy, values = self.policy(states)
        ratio = (policy.log_prob(actions) - old).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        value_loss = (values - returns).square().mean()
        entropy = policy.entropy().mean()
        self.optimizer.zero_grad()
        (policy_loss + 0.5 * value_loss - self.entropy * entropy).backward()
        nn.utils.clip_grad_norm_(self.policy.parameters(), 0.5)
        self.optimizer.step()
        return [policy_loss.item(), value_loss.item(), entropy.item()]

"""Gates, Kronecker factors and H-OBS against what they stand for: loops, finite differences, least squares."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from hobs_rspar import cost, surgery
from hobs_rspar.curvature import statistics
from hobs_rspar.curvature.analyzer import HOBSSensitivityAnalyzer
from hobs_rspar.curvature.gates import Gates, fisher_score, gate_gradients, taylor_score
from hobs_rspar.curvature.hobs import Consumer, analyse, centred, collect_factors, consumers, eliminate, kfac_score
from hobs_rspar.curvature.kfac import KFACHessianApproximator, damped
from hobs_rspar.curvature.passes import sampled_labels
from hobs_rspar.errors import UserError
from hobs_rspar.loaders import from_loader
from hobs_rspar.training import accuracy, logits
from small import (
    IMAGES,
    ZOO,
    Joined,
    Mixed,
    Plain,
    Stream,
    assert_same,
    images,
    seeded,
    sensitivity_options,
    snapshot,
    trained,
    trained_mixed,
    zoo,
)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def loader(count: int = 96, size: int = 32) -> list:
    data = images(count)
    return [(data.normalised(data.pixels[i:i + size]).contiguous(), data.labels[i:i + size])
            for i in range(0, count, size)]


def rows_from_weights(network: nn.Module, groups, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gate gradients another way: a gate scales its consumers' input weights, so dL/dgate = sum of W x dL/dW."""
    rows = torch.zeros(len(x), int(groups.sizes.sum()))
    for n in range(len(x)):
        network.zero_grad()
        F.cross_entropy(network(x[n:n + 1]), labels[n:n + 1]).backward()
        column = 0
        for group in groups:
            for channel in range(group.channels):
                for member in group.with_role("consumer"):
                    weight = network.get_submodule(member.layer).weight
                    product = (weight * weight.grad).transpose(0, 1).flatten(1).sum(1).detach()
                    rows[n, column] += product[list(member.index[channel])].sum()
                column += 1
    return rows


# --- gates

@pytest.mark.parametrize("kind", [Mixed, Joined])
def test_gate_gradients_are_those_of_the_consumers_weights(kind):
    network, data = seeded(kind), images(10)
    groups = surgery.groups(network, IMAGES[:1])
    seen = gate_gradients(network, Gates(groups), data, 4)  # batches of 4, 4 and 2
    wanted = rows_from_weights(copy.deepcopy(network), groups, data.normalised(data.pixels), data.labels)
    assert seen.shape == wanted.shape and wanted.abs().max() > 1e-2
    assert torch.allclose(seen, wanted, atol=1e-5 * wanted.abs().max().item())


def test_gate_gradients_are_finite_differences():
    network, data = seeded(Mixed), images(6)
    gates = Gates(surgery.groups(network, IMAGES[:1]))
    seen = gate_gradients(network, gates, data, 6)
    double, x = copy.deepcopy(network).double(), data.normalised(data.pixels).double()

    def losses(column: int, value: float) -> torch.Tensor:
        gate = torch.ones(1, gates.total, dtype=torch.float64)
        gate[0, column] = value
        with torch.no_grad(), gates.applied(double, gate):
            return F.cross_entropy(double(x), data.labels, reduction="none")

    for column in range(gates.total):
        slope = (losses(column, 1 + 1e-6) - losses(column, 1 - 1e-6)) / 2e-6
        assert torch.allclose(seen[:, column].double(), slope, atol=1e-4), column


def test_fisher_score_of_given_labels():
    network, data = seeded(Mixed), images(12)
    groups = surgery.groups(network, IMAGES[:1])
    x = data.normalised(data.pixels)
    labels = sampled_labels(network(x), seed(3))
    rows = rows_from_weights(copy.deepcopy(network), groups, x, labels)
    seen = fisher_score(gate_gradients(network, Gates(groups), data, 12, seed(3)))
    assert torch.allclose(seen, 0.5 * (rows**2).mean(0), rtol=1e-3, atol=1e-8)
    assert (labels != data.labels).any()


def test_sampled_labels_give_the_fisher_on_average():
    network, data = seeded(Mixed), images(8)
    with torch.no_grad():
        network.out.weight *= 6  # predictions far from even, so that it matters which distribution labels come from
    groups = surgery.groups(network, IMAGES[:1])
    gates, x = Gates(groups), data.normalised(data.pixels)
    probability = network(x).detach().softmax(1)
    exact = torch.zeros(gates.total)
    for y in range(4):
        rows = gate_gradients(network, gates, replace(data, labels=torch.full((8,), y)), 8)
        exact += 0.5 * probability[:, y] @ rows**2 / 8
    many = replace(data, pixels=data.pixels.repeat(400, 1, 1, 1), labels=data.labels.repeat(400))
    drawn = fisher_score(gate_gradients(network, gates, many, 3200, seed()))
    assert torch.allclose(drawn, exact, rtol=0.15)
    assert spearmanr(drawn, exact).statistic > 0.98


def test_taylor_score_squares_the_mean_of_each_minibatch():
    rows = torch.randn(10, 3, generator=seed())
    parts = [rows[:4], rows[4:8], rows[8:]]
    wanted = [sum(float(part[:, c].mean()) ** 2 for part in parts) / 3 for c in range(3)]
    assert taylor_score(rows, 4).tolist() == pytest.approx(wanted)


def test_first_order_and_fisher_predict_the_loss_of_closing_a_channel():
    train, data = images(1024, wrong=0.4), images(256, seed=3, wrong=0.4)
    torch.manual_seed(0)
    network = trained(Stream(), train, epochs=2, learning_rate=0.02)
    assert accuracy(logits(network, data), data.labels) > 60  # of 70 that can be reached
    gates = Gates(surgery.groups(network, IMAGES[:1]))
    rows = gate_gradients(network, gates, data, 256)
    predicted = fisher_score(rows) - rows.mean(0)
    x, changes = data.normalised(data.pixels), []
    with torch.no_grad():
        dense = F.cross_entropy(network(x), data.labels).item()
        for column in range(gates.total):
            gate = torch.ones(1, gates.total)
            gate[0, column] = 0
            with gates.applied(network, gate):
                changes.append(F.cross_entropy(network(x), data.labels).item() - dense)
    assert spearmanr(predicted, changes).statistic >= 0.95


def test_gates_leave_the_network_alone():
    network, data = seeded(Mixed), images(8)
    network.stem.weight.requires_grad_(False)
    before = snapshot(network)
    gates = Gates(surgery.groups(network, IMAGES[:1]))
    first, second = (gate_gradients(network, gates, data, 8, seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert_same(before, snapshot(network))
    with pytest.raises(ZeroDivisionError), gates.applied(network, torch.ones(1, gates.total)):
        raise ZeroDivisionError
    assert_same(before, snapshot(network))


class Interrupted(Exception):
    pass


class Interrupting(Mixed):
    """Fails when it is called in earnest (as for want of memory), not while it is traced."""

    def forward(self, x):
        if len(x) > 8:
            raise Interrupted
        return super().forward(x)


@pytest.mark.parametrize("kfac", [True, False])
def test_an_interrupted_analysis_leaves_the_network_as_it_was(kfac):
    network = Interrupting()
    network.load_state_dict(seeded(Mixed).state_dict())
    before = snapshot(network)
    assert network.training
    with pytest.raises(Interrupted):
        HOBSSensitivityAnalyzer(network, use_kfac=kfac).compute_sensitivity(loader())
    assert_same(before, snapshot(network))


# --- Kronecker factors

LAYERS = {
    "plain": (nn.Conv2d(3, 4, 3), 3),
    "stride and padding": (nn.Conv2d(3, 4, 3, stride=2, padding=1), 3),
    "dilation, no bias": (nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), 3),
    "rectangular": (nn.Conv2d(3, 4, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2)), 3),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), 4),
    "depthwise": (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False), 4),
    "1x1": (nn.Conv2d(3, 5, 1), 3),
    "linear": (nn.Linear(3, 5), 3),
}


class Levelled(nn.Conv2d):
    """Standardises its weight: not what its weight on its input's patches gives."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def factors_of(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor, **options) -> KFACHessianApproximator:
    """Factors of one layer whose output gradients are given."""
    kfac = KFACHessianApproximator(nn.Sequential(layer), update_freq=1, **options)
    kfac.register_hooks()
    kfac.model(x).backward(gradient)
    kfac.update_factors()
    kfac.remove_hooks()
    return kfac


def loop_factors(layer: nn.Conv2d, x: torch.Tensor, gradient: torch.Tensor):
    """KFC by plain loops: A = E[sum_t a a^T] and G = E[(1/T) sum_t g g^T] of every group of the convolution."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    padded = F.pad(x, (pw, pw, ph, ph))
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    a = torch.zeros(layer.groups, ins * kh * kw + 1, ins * kh * kw + 1)
    g = torch.zeros(layer.groups, outs, outs)
    height, width = gradient.shape[2:]
    for n in range(len(x)):
        for group in range(layer.groups):
            for i in range(height):
                for j in range(width):
                    rows = slice(i * sh, i * sh + dh * (kh - 1) + 1, dh)
                    columns = slice(j * sw, j * sw + dw * (kw - 1) + 1, dw)
                    patch = padded[n, group * ins:(group + 1) * ins, rows, columns].flatten()
                    patch = torch.cat([patch, torch.ones(1)])
                    slope = gradient[n, group * outs:(group + 1) * outs, i, j]
                    a[group] += torch.outer(patch, patch) / len(x)
                    g[group] += torch.outer(slope, slope) / (height * width) / len(x)
    return a, g


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "linear"])
def test_factors_are_the_loops(name):
    layer, channels = LAYERS[name]
    x = torch.randn(3, channels, 6, 5, generator=seed())
    gradient = torch.randn(layer(x).shape, generator=seed(1))
    kfac = factors_of(layer, x.clone().requires_grad_(), gradient)
    a, g = loop_factors(layer, x, gradient)
    assert torch.allclose(kfac.input_factor("0"), a, atol=1e-4)
    assert torch.allclose(kfac.output_factor("0"), g, atol=1e-5)
    assert torch.allclose(kfac.input_factor("0")[:, -1, -1], torch.tensor(float(gradient[0, 0].numel())))  # T


def test_factors_of_a_linear_layer():
    layer, _ = LAYERS["linear"]
    x, gradient = torch.randn(7, 3, generator=seed()), torch.randn(7, 5, generator=seed(1))
    kfac = factors_of(layer, x, gradient)
    ones = torch.cat([x, torch.ones(7, 1)], 1)
    assert torch.allclose(kfac.input_factor("0")[0], ones.T @ ones / 7, atol=1e-6)
    assert torch.allclose(kfac.output_factor("0")[0], gradient.T @ gradient / 7, atol=1e-6)


def weight_gradients(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Per-image gradients of the flattened weight [N, weights]."""
    return torch.stack([torch.autograd.grad(layer(x[n:n + 1]), layer.weight, gradient[n:n + 1])[0].flatten()
                        for n in range(len(x))])


@pytest.mark.parametrize("name", ["linear", "1x1", "plain"])
def test_one_image_at_one_position_is_the_dense_fisher(name):
    layer, channels = LAYERS[name]
    x = torch.randn(1, channels, *([] if name == "linear" else layer.kernel_size), generator=seed())
    gradient = torch.randn(layer(x).shape, generator=seed(1))
    kfac = factors_of(layer, x, gradient)
    row = weight_gradients(layer, x, gradient)[0]
    product = torch.kron(kfac.output_factor("0")[0], kfac.input_factor("0")[0, :-1, :-1])
    assert torch.allclose(product, torch.outer(row, row), atol=1e-5)
    assert torch.allclose(kfac.compute_fisher_diagonal("0").flatten(), row**2, atol=1e-5)


def test_the_scaling_over_positions_is_that_of_the_dense_fisher():
    """Equal patches, and gradients whose positions are uncorrelated over the images: there KFC is exact."""
    layer = nn.Conv2d(2, 3, 2, stride=2, bias=False)
    x = torch.ones(4, 2, 4, 4) * torch.tensor([0.7, -1.3])[:, None, None]
    signs = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).float()  # [images, positions]
    slopes = torch.randn(3, 4, generator=seed())  # one gradient per position
    gradient = (signs[:, None, :] * slopes).view(4, 3, 2, 2)
    rows = weight_gradients(layer, x, gradient)
    kfac = factors_of(layer, x, gradient)
    product = torch.kron(kfac.output_factor("0")[0], kfac.input_factor("0")[0, :-1, :-1])
    assert torch.allclose(product, rows.T @ rows / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(LAYERS))
def test_a_filters_own_cost_needs_no_input_factor(name):
    """1/2 w^T (A x G) w = 1/2 Gamma_ii E[sum_t z^2], the bias with its constant input included."""
    layer, channels = LAYERS[name]
    x = torch.randn(3, channels, *([] if name == "linear" else [6, 5]), generator=seed())
    gradient = torch.randn(layer(x).shape, generator=seed(1))
    kfac = factors_of(layer, x.clone().requires_grad_(), gradient)
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().reshape(groups, layer.weight.shape[0] // groups, -1)
    bias = torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()
    filters = torch.cat([weight, bias.view(groups, -1, 1)], 2)
    gamma = kfac.output_factor("0").diagonal(dim1=1, dim2=2)
    with_factor = 0.5 * gamma * ((filters @ kfac.input_factor("0")) * filters).sum(2)
    z = layer(x).detach().flatten(2) if name != "linear" else layer(x).detach()[:, :, None]
    without = 0.5 * gamma.flatten() * z.square().sum(2).mean(0)
    assert torch.allclose(with_factor.flatten(), without, rtol=1e-4)


@pytest.mark.parametrize("name", list(LAYERS))
def test_fisher_diagonal_has_the_weights_shape_and_values(name):
    layer, channels = LAYERS[name]
    x = torch.randn(3, channels, *([] if name == "linear" else [6, 5]), generator=seed())
    gradient = torch.randn(layer(x).shape, generator=seed(1))
    kfac = factors_of(layer, x.clone().requires_grad_(), gradient)
    diagonal = kfac.compute_fisher_diagonal("0")
    assert diagonal.shape == layer.weight.shape
    a, g = kfac.input_factor("0"), kfac.output_factor("0")
    groups = getattr(layer, "groups", 1)
    for o in range(layer.weight.shape[0]):
        outputs = layer.weight.shape[0] // groups
        group, row = o // outputs, o % outputs
        for i, value in enumerate(diagonal[o].flatten()):
            assert float(value) == pytest.approx(float(g[group, row, row] * a[group, i, i]), rel=1e-5)


def test_sampled_positions_estimate_the_sum_over_all():
    layer = nn.Conv2d(2, 3, 3, padding=1)
    x, gradient = torch.randn(4, 2, 8, 8, generator=seed()), torch.randn(4, 3, 8, 8, generator=seed(1))
    x = x + torch.linspace(-1, 1, 8)  # positions differ
    full = factors_of(layer, x, gradient)
    draws = [factors_of(layer, x, gradient, positions=16, generator=seed(n)) for n in range(300)]
    mean = torch.stack([kfac.input_factor("0") for kfac in draws]).mean(0)
    assert torch.allclose(mean, full.input_factor("0"), rtol=0.05, atol=2)
    assert not torch.allclose(draws[0].input_factor("0"), full.input_factor("0"), rtol=0.05, atol=2)
    assert draws[0].input_factor("0")[0, -1, -1].item() == pytest.approx(64)
    assert torch.equal(draws[0].output_factor("0"), full.output_factor("0"))  # G uses all positions


def test_factors_average_over_images_of_all_batches_and_skip_by_update_freq():
    layer = nn.Conv2d(2, 3, 3)
    x, gradient = torch.randn(6, 2, 5, 5, generator=seed()), torch.randn(6, 3, 3, 3, generator=seed(1))
    whole = factors_of(layer, x, gradient)
    for freq, counted in ((1, slice(0, 6)), (2, slice(0, 4))):
        kfac = KFACHessianApproximator(nn.Sequential(layer), update_freq=freq)
        kfac.register_hooks()
        parts = [slice(0, 4), slice(4, 6)]
        for part in parts:
            kfac.model(x[part]).backward(gradient[part])
            kfac.update_factors()
        alone = factors_of(layer, x[counted], gradient[counted])
        assert torch.allclose(kfac.input_factor("0"), alone.input_factor("0"), rtol=1e-4, atol=1e-4)
        assert torch.allclose(kfac.output_factor("0"), alone.output_factor("0"), rtol=1e-4, atol=1e-6)
        assert torch.allclose(kfac.input_factor("0"), whole.input_factor("0"), rtol=1e-4, atol=1e-4) is (freq == 1)


def test_inverse_is_that_of_the_damped_factors():
    layer = nn.Linear(3, 4)
    kfac = factors_of(layer, torch.randn(9, 3, generator=seed()), torch.randn(9, 4, generator=seed(1)), damping=0.1)
    for inverse, factor in zip(kfac.inverse("0"), (kfac.input_factor("0")[:, :-1, :-1], kfac.output_factor("0"))):
        level = factor[0].diagonal().mean()
        assert torch.allclose(inverse[0] @ (factor[0] + 0.1 * level * torch.eye(len(factor[0]))),
                              torch.eye(len(factor[0])), atol=1e-4)


def test_kfac_says_what_is_missing():
    kfac = KFACHessianApproximator(seeded(Plain), update_freq=1)
    with pytest.raises(UserError, match="no gradients captured: call register_hooks"):
        kfac.update_factors()
    with pytest.raises(UserError, match="no factors for layer 'first'"):
        kfac.compute_fisher_diagonal("first")
    with pytest.raises(UserError, match="damping must be > 0 and update_freq >= 1; seen: 0, 10"):
        KFACHessianApproximator(seeded(Plain), damping=0)
    with pytest.raises(UserError, match="scripted"):
        KFACHessianApproximator(torch.jit.script(seeded(Plain)))
    own = nn.Sequential(Levelled(2, 3, 3))
    kfac = KFACHessianApproximator(own, update_freq=1)
    kfac.register_hooks()
    own(torch.randn(1, 2, 5, 5)).sum().backward()
    kfac.update_factors()
    with pytest.raises(UserError, match="no factors for layer '0': Levelled has a forward of its own"):
        kfac.input_factor("0")


def test_collected_factors_are_those_of_sampled_labels():
    network, data = seeded(Mixed), images(16)
    before = snapshot(network)
    found = collect_factors(network, data, sensitivity_options(batch_size=16, positions=None), seed(5))
    assert_same(before, snapshot(network))
    x = data.normalised(data.pixels)
    outputs = {}
    hook = network.down.register_forward_hook(lambda _m, inputs, out: outputs.update(x=inputs[0], z=out))
    out = network(x)
    hook.remove()
    labels = sampled_labels(out, seed(5))
    gradient = torch.autograd.grad(F.cross_entropy(out, labels, reduction="sum"), outputs["z"])[0]
    a, g = loop_factors(network.down, outputs["x"].detach(), gradient)
    assert torch.allclose(found["down/a"], a, rtol=1e-3, atol=1e-3)
    assert torch.allclose(found["down/g"], g, rtol=1e-3, atol=1e-7)
    names = {name for name, layer in network.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    assert found.keys() == {f"{name}/{part}" for name in names for part in "ag"}


# --- H-OBS

def two_consumers(outputs=(4, 3), channels: int = 5, areas=(4, 1), count: int = 400):
    """Consumers with data: the group's channels are scattered over the inputs of the second, which has others, too."""
    random = seed(7)
    parts, data = [], []
    for number, (out, area) in enumerate(zip(outputs, areas)):
        inputs = channels + 2 * number
        index = torch.arange(channels) if number == 0 else torch.randperm(inputs, generator=random)[:channels]
        mixing = torch.randn(inputs * area, inputs * area, generator=random, dtype=torch.float64)
        x = torch.randn(count, inputs * area, generator=random, dtype=torch.float64) @ mixing + 1.5
        weight = torch.randn(out, inputs, area, generator=random, dtype=torch.float64)
        fisher = torch.rand(out, generator=random, dtype=torch.float64) + 0.1
        centre = x - x.mean(0)
        parts.append(Consumer(weight, centre.T @ centre / count, fisher, index[:, None]))
        data.append(centre)
    return parts, data


def refit(part: Consumer, x: torch.Tensor, gone: list[int], ridge: float = 0.0) -> torch.Tensor:
    """Squared output error per row [outputs] of the best weight without the channels ``gone``, by least squares."""
    area = part.weight.shape[2]
    dead = {int(i) * area + k for c in gone for i in part.index[c] for k in range(area)}
    keep = [i for i in range(x.shape[1]) if i not in dead]
    weight = part.weight.flatten(1)
    extra = math.sqrt(ridge) * torch.eye(x.shape[1], dtype=x.dtype)  # ridge as additional data
    rows = torch.cat([x / math.sqrt(len(x)), extra])
    target = rows @ weight.T
    best = torch.linalg.lstsq(rows[:, keep], target).solution
    return (rows[:, keep] @ best - target).square().sum(0)


def brute_force(parts, data, ridges=(0.0, 0.0)):
    """Greedy elimination that solves every least-squares problem anew."""
    alive, gone, order, costs, errors = set(range(len(parts[0].index))), [], [], [], []
    before = 0.0
    while alive:
        found = {}
        for channel in alive:
            rows = [refit(part, x, [*gone, channel], ridge) for part, x, ridge in zip(parts, data, ridges)]
            found[channel] = (sum(0.5 * float(row @ part.fisher) for row, part in zip(rows, parts)),
                              sum(float(row.sum()) for row in rows))
        best = min(found, key=lambda c: found[c][0])
        order.append(best)
        costs.append(found[best][0] - before)
        errors.append(found[best][1])
        before = found[best][0]
        gone.append(best)
        alive.remove(best)
    return order, costs, errors


def test_elimination_is_greedy_least_squares():
    parts, data = two_consumers()
    order, costs, errors = brute_force(parts, data)
    seen = eliminate(parts, 1e-12)
    assert seen.order.tolist() == order and order != sorted(order)
    assert seen.cost.tolist() == pytest.approx(costs, rel=1e-6)
    energy = sum(float((x @ part.weight.flatten(1).T).square().sum()) / len(x) for part, x in zip(parts, data))
    assert seen.relative.tolist() == pytest.approx([error / energy for error in errors], rel=1e-6)
    score = seen.score
    assert [float(score[channel]) for channel in order] == pytest.approx(np.cumsum(costs).tolist(), rel=1e-6)


def test_damping_is_a_ridge_relative_to_the_mean_variance():
    parts, data = two_consumers()
    ridges = [0.2 * float(part.covariance.diagonal().mean()) for part in parts]
    order, costs, _ = brute_force(parts, data, ridges)
    seen = eliminate(parts, 0.2)
    assert seen.order.tolist() == order
    assert seen.cost.tolist() == pytest.approx(costs, rel=1e-6)
    assert torch.equal(damped(parts[0].covariance, 0.2),
                       parts[0].covariance + ridges[0] * torch.eye(20, dtype=torch.float64))


def test_the_first_cost_of_every_channel_is_the_optimum():
    """Each channel alone, made the only one that can go: the others are not the group's."""
    parts, data = two_consumers()
    for channel in range(5):
        alone = [Consumer(part.weight, part.covariance, part.fisher, part.index[channel:channel + 1]) for part in parts]
        wanted = sum(0.5 * float(refit(part, x, [channel]) @ part.fisher) for part, x in zip(parts, data))
        assert eliminate(alone, 1e-12).cost.tolist() == pytest.approx([wanted], rel=1e-6)


def test_elimination_leaves_its_inputs_alone():
    parts, _ = two_consumers()
    before = [(part.weight.clone(), part.covariance.clone()) for part in parts]
    first, second = eliminate(parts, 1e-3), eliminate(parts, 1e-3)
    assert torch.equal(first.order, second.order) and torch.equal(first.cost, second.cost)
    assert all(torch.equal(a, part.weight) and torch.equal(b, part.covariance) for (a, b), part in zip(before, parts))


def test_channels_that_others_can_replace_cost_nothing():
    parts, data = two_consumers(areas=(1, 1))
    x = data[0].clone()
    x[:, 3] = 0.5 * x[:, 1] - 2 * x[:, 4]
    part = Consumer(parts[0].weight, x.T @ x / len(x), parts[0].fisher, parts[0].index)
    seen = eliminate([part], 1e-10)
    assert seen.order[0] in (1, 3, 4) and seen.relative[0] < 1e-6 < seen.relative[1]


def test_kfac_score_is_the_trace():
    parts, _ = two_consumers()
    fisher = []
    for part in parts:
        root = torch.randn(len(part.weight), len(part.weight), generator=seed(9), dtype=torch.float64)
        fisher.append(root @ root.T)
    wanted = []
    for channel in range(5):
        total = 0.0
        for part, g in zip(parts, fisher):
            area = part.weight.shape[2]
            columns = [int(i) * area + k for i in part.index[channel] for k in range(area)]
            w, a = part.weight.flatten(1)[:, columns], part.covariance[columns][:, columns]
            total += 0.5 * float(torch.trace(g @ w @ a @ w.T))
        wanted.append(total)
    assert kfac_score(parts, fisher).tolist() == pytest.approx(wanted)


def test_flattened_channels_are_one_block():
    network, data = seeded(Mixed), images(64)
    groups = surgery.groups(network, IMAGES[:1])
    factors = collect_factors(network, data, sensitivity_options(positions=None), seed())
    group = groups.named("down")
    (part,) = consumers(group, network, factors)
    assert part.weight.shape == (7, 125, 1) and part.index.shape == (5, 25)
    assert torch.equal(part.index.flatten(), torch.arange(125))
    assert torch.allclose(part.fisher, factors["hidden/g"][0].diagonal().double())


def test_covariance_has_its_mean_taken_out():
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(5, 2, 7, 7, generator=seed()) + 2
    kfac = factors_of(layer, x, torch.randn(layer(x).shape, generator=seed(1)))
    patches = F.unfold(x, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double()
    covariance = (patches - patches.mean(0)).T @ (patches - patches.mean(0)) / 5  # E[sum_t ...]: divided by images
    assert torch.allclose(centred(kfac.input_factor("0")[0].double()), covariance, atol=1e-4)


def test_analysis_covers_every_group_and_is_repeatable():
    network, data = trained_mixed(), images(128)
    groups = surgery.groups(network, IMAGES[:1])
    gates, factors = statistics.collect(network, groups, data, sensitivity_options(), seed())
    again, factors_again = statistics.collect(network, groups, data, sensitivity_options(), seed())
    assert all(torch.equal(gates[name], again[name]) for name in gates)
    assert all(torch.equal(factors[name], factors_again[name]) for name in factors)
    total = int(groups.sizes.sum())
    assert {name: tuple(tensor.shape) for name, tensor in gates.items()} == \
        {"true_rows": (128, total), "sampled_rows": (128, total)} | dict.fromkeys(
            [*statistics.SCORES, "relative"], (total,))
    assert all(tensor.dtype == torch.float32 for tensor in [*gates.values(), *factors.values()])
    found = analyse(network, groups, factors, 1e-3)
    assert torch.equal(torch.cat(found.scores["hobs"]).float(), gates["hobs"])
    for group, curve in zip(groups, gates["relative"].split(groups.sizes.tolist())):
        assert (curve.diff() >= -1e-6).all() and curve[-1] == pytest.approx(1, abs=0.02), group.name


def test_hobs_beats_magnitude_where_channels_are_redundant():
    """Planted: a channel with large weights that another one copies. Magnitude keeps it, H-OBS lets one of them go."""
    network = seeded(Plain)
    with torch.no_grad():
        network.first.weight[5], network.first.bias[5] = 3 * network.first.weight[2], 3 * network.first.bias[2]
    groups = surgery.groups(network, IMAGES[:1])
    gates, _ = statistics.collect(network, groups, images(256), sensitivity_options(damping=1e-6), seed())
    hobs, l1 = gates["hobs"][:8], gates["l1"][:8]
    assert int(hobs.argmin()) in (2, 5) and hobs.min() < 1e-3 * hobs.median()
    assert int(l1.argmax()) == 5


# --- the published front

@pytest.mark.parametrize("kfac", [True, False])
def test_analyzer_scores_every_layer_that_can_be_pruned(kfac):
    network = trained_mixed()
    before = snapshot(network)
    analyzer = HOBSSensitivityAnalyzer(network, damping=1e-2, use_kfac=kfac)
    scores = analyzer.compute_sensitivity(loader(), num_batches=2)
    assert_same(before, snapshot(network))
    assert {name: len(values) for name, values in scores.items()} == \
        {"stem": 6, "project": 6, "expand": 8, "depthwise": 8, "down": 5, "hidden": 7}
    assert torch.equal(scores["stem"], scores["project"]) and torch.equal(scores["expand"], scores["depthwise"])
    assert not torch.equal(scores["stem"], scores["expand"][:6])
    (data, _), groups = from_loader(loader(), 2), surgery.groups(network, IMAGES[:1])
    if kfac:
        options = sensitivity_options(batch_size=32, positions=None, damping=1e-2)
        wanted = analyse(network, groups, collect_factors(network, data, options, seed()), 1e-2).scores["hobs"]
    else:
        gates = Gates(groups)
        wanted = gates.split(fisher_score(gate_gradients(network, gates, data, 32, seed())))
    for group, values in zip(groups, wanted):
        assert torch.allclose(scores[group.name], values.float(), rtol=1e-3, atol=1e-9)
    again = HOBSSensitivityAnalyzer(network, damping=1e-2, use_kfac=kfac).compute_sensitivity(loader(), num_batches=2)
    assert all(torch.equal(scores[name], again[name]) for name in scores)


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_the_published_sequence_meets_its_ratio(ratio):
    network, data, example = zoo("resnet8"), images(32, 1, 28, 10), ZOO["resnet8"].example()
    analyzer = HOBSSensitivityAnalyzer(network)
    scores = analyzer.compute_sensitivity([(data.normalised(data.pixels), data.labels)])
    plan = analyzer.get_pruning_plan(ratio)
    pruned = surgery.PhysicalPruner(network, example).prune(plan)
    kept_macs = cost.count(pruned, example).macs / cost.count(network, example).macs
    assert abs(kept_macs - (1 - ratio)) <= 0.01 * (1 - ratio)
    for name, gone in plan.items():
        kept = sorted(set(range(len(scores[name]))) - set(gone))
        assert gone == sorted(gone) and scores[name][gone].max() <= scores[name][kept].min()
        assert pruned.get_submodule(name).weight.shape[0] == len(kept)


def test_analyzer_refuses():
    analyzer = HOBSSensitivityAnalyzer(seeded(Mixed))
    with pytest.raises(UserError, match=r"call compute_sensitivity\(dataloader\) first"):
        analyzer.get_pruning_plan()
    with pytest.raises(UserError, match="criterion MSELoss is not supported"):
        analyzer.compute_sensitivity(loader(), nn.MSELoss())
    with pytest.raises(UserError, match="the dataloader is empty"):
        analyzer.compute_sensitivity([])
    analyzer.compute_sensitivity(loader(), nn.CrossEntropyLoss(), 1)
    for ratio in (0, 1, 1.5, -0.2):
        with pytest.raises(UserError, match=r"must be within \(0, 1\); seen"):
            analyzer.get_pruning_plan(ratio)


def test_analyzer_restores_the_mode():
    network = seeded(Mixed).train()
    HOBSSensitivityAnalyzer(network).compute_sensitivity(loader(), num_batches=1)
    assert all(module.training for module in network.modules())


def test_analyzer_leaves_a_frozen_batch_norm_frozen():
    network = seeded(Mixed).train()
    network.stem_bn.eval()
    HOBSSensitivityAnalyzer(network).compute_sensitivity(loader(), num_batches=1)
    assert not network.stem_bn.training and network.expand_bn.training

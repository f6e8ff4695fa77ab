"""The trace and its self-check: networks of many kinds are cut rightly, or kept whole with the reason."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hobs_rspar
from hobs_rspar import cost, slicing, surgery
from hobs_rspar.errors import UserError
from hobs_rspar.structure import rules

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Of(nn.Module):
    """A network of named parts and a function of them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def ended(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))


def pooled(network, y):
    return network.out(F.relu(y).mean((2, 3)))


class FrozenNorm(nn.Module):
    """Detection networks' batch norm: buffers alone."""

    def __init__(self, channels: int):
        super().__init__()
        for name in ("weight", "bias", "mean", "var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.mean * scale).reshape(1, -1, 1, 1)


class Levelled(nn.Conv2d):
    """Weight standardisation over the inputs."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), True)
        return F.conv2d(x, weight / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5), self.bias, 1, self.padding)


class ChannelsLastNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def squeezed(network, x):
    y = F.relu(torch.cat([network.a(x), network.b(x)], 1))
    gate = torch.sigmoid(network.up(F.relu(network.down(y.mean((2, 3))))))
    return pooled(network, network.c(y * gate[:, :, None, None]))


def attended(network, x):
    y = F.relu(network.a(x))
    q, k, v = (part(y).flatten(2) for part in (network.q, network.k, network.v))
    weights = (q.transpose(1, 2) @ k).softmax(-1)
    return pooled(network, y + (v @ weights.transpose(1, 2)).view_as(y))


def padded(network, x):
    x = F.relu(network.low(x))
    return pooled(network, network.high(F.relu(network.rung(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))))


def unpooled(network, x):
    y, index = F.max_pool2d(F.relu(network.a(x)), 2, return_indices=True)
    return pooled(network, network.b(F.max_unpool2d(y, index, 2)))


def shifted(network, x):
    y = F.relu(network.a(x))
    moved = torch.zeros_like(y)
    moved[:, :, 1:] = y[:, :, :-1]
    return pooled(network, network.b(moved))


def gated_halves(network, x):
    one, other = network.a(x).chunk(2, 1)
    return pooled(network, network.b(one * torch.sigmoid(other)))


OUT = {"out": nn.Linear(8, 10)}
# network -> names of the groups that must be free, and their channels
CUT = {
    "prelu": (lambda: ended(conv(3, 12), nn.PReLU(), conv(12, 8), nn.PReLU(8), features=8), {"0": 12, "2": 8}),
    "sync_batchnorm": (lambda: ended(conv(3, 12), nn.SyncBatchNorm(12), nn.ReLU(True), features=12), {"0": 12}),
    "batchnorm_without_affine": (lambda: ended(conv(3, 12), nn.BatchNorm2d(12, affine=False), features=12), {"0": 12}),
    "group_norm": (lambda: ended(conv(3, 24), nn.GroupNorm(6, 24), conv(24, 8), features=8), {"0": 6, "2": 8}),
    "instance_norm": (lambda: ended(conv(3, 12), nn.InstanceNorm2d(12, affine=True), conv(12, 8), features=8),
                      {"0": 12, "2": 8}),
    "batchnorm1d": (lambda: nn.Sequential(conv(3, 6), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 16),
                                          nn.BatchNorm1d(16), nn.ReLU(True), nn.Dropout(0.3), nn.Linear(16, 10)),
                    {"0": 6, "3": 16}),
    "transposed": (lambda: ended(conv(3, 12, stride=2), nn.ReLU(), nn.ConvTranspose2d(12, 8, 4, 2, 1), nn.ReLU(),
                                 nn.ConvTranspose2d(8, 8, 2, 2, groups=8), conv(8, 6), features=6),
                   {"0": 12, "2": 8, "5": 6}),
    "same_padding": (lambda: ended(nn.Conv2d(3, 12, 3, padding="same"), nn.ReLU(),
                                   nn.Conv2d(12, 8, 4, padding="same", dilation=2), features=8), {"0": 12, "2": 8}),
    "padding_modes": (lambda: ended(conv(3, 12, padding_mode="circular"), nn.ReLU(),
                                    conv(12, 8, padding_mode="reflect"), features=8), {"0": 12, "2": 8}),
    "grouped": (lambda: ended(conv(3, 24), nn.ReLU(), conv(24, 16, groups=4), features=16), {"0": 6, "2": 4}),
    "grouped_transposed": (lambda: ended(conv(3, 24), nn.ConvTranspose2d(24, 16, 2, 2, groups=4), features=16),
                           {"0": 6, "1": 4}),
    "depthwise_multiplier": (lambda: ended(conv(3, 6), nn.Conv2d(6, 12, 3, groups=6), conv(12, 8), features=8),
                             {"0": 6, "2": 8}),
    "concat_and_squeeze": (lambda: Of(squeezed, a=conv(3, 8), b=conv(3, 8), down=nn.Linear(16, 4), up=nn.Linear(4, 16),
                                      c=conv(16, 8), **OUT), {"a": 8, "b": 8, "down": 4, "c": 8}),
    "zero_padded_shortcut": (lambda: Of(padded, low=conv(3, 8), rung=conv(8, 16, stride=2), high=conv(16, 8), **OUT),
                             {"low": 8, "high": 8}),
    "pixel_shuffle": (lambda: Of(lambda net, x: pooled(net, net.b(F.pixel_shuffle(F.relu(net.a(x)), 2))),
                                 a=conv(3, 24), b=conv(6, 8), **OUT), {"a": 6, "b": 8}),
    "pixel_unshuffle": (lambda: Of(lambda net, x: pooled(net, net.b(F.pixel_unshuffle(net.a(x), 2))),
                                   a=conv(3, 6), b=conv(24, 8), **OUT), {"a": 6, "b": 8}),
    "max_unpool": (lambda: Of(unpooled, a=conv(3, 8), b=conv(8, 8), **OUT), {"a": 8, "b": 8}),
    "glu": (lambda: Of(lambda net, x: pooled(net, net.b(F.glu(net.a(x), 1))), a=conv(3, 24), b=conv(12, 8), **OUT),
            {"a": 12, "b": 8}),
    "gated_halves": (lambda: Of(gated_halves, a=conv(3, 24), b=conv(12, 8), **OUT), {"a": 12, "b": 8}),
    "layer_scale": (lambda: Of(lambda net, x: pooled(net, (y := net.a(x)) + net.gain * net.b(y)), a=conv(3, 8),
                               b=conv(8, 8), gain=nn.Parameter(torch.rand(8, 1, 1)), **OUT), {"a": 8}),
    "frozen_norm": (lambda: ended(conv(3, 12), FrozenNorm(12), nn.ReLU(), features=12), {"0": 12}),
    "permuted_and_flattened": (lambda: Of(lambda net, x: net.out(F.relu(net.a(x)).permute(0, 2, 3, 1).flatten(1)),
                                          a=conv(3, 6, stride=2), out=nn.Linear(6 * 64, 10)), {"a": 6}),
    "copied_into": (lambda: Of(shifted, a=conv(3, 8), b=conv(8, 8), **OUT), {"a": 8, "b": 8}),
    "dropouts": (lambda: ended(conv(3, 12), nn.Dropout2d(0.3), conv(12, 8), nn.AlphaDropout(0.2), features=8),
                 {"0": 12, "2": 8}),
    "weight_standardisation_of_outputs": (lambda: ended(Levelled(3, 12, 3, padding=1), nn.ReLU(), features=12),
                                          {"0": 12}),
}


@pytest.mark.parametrize("kind", CUT)
def test_these_are_cut_rightly(kind):
    torch.manual_seed(0)
    network = CUT[kind][0]().eval()
    groups = surgery.groups(network, X)
    assert {group.name: group.channels for group in groups if not group.protected}.items() >= CUT[kind][1].items()
    random = np.random.default_rng(0)
    kept = [sorted(random.choice(g.channels, max(1, g.channels // 2), replace=False).tolist()) if not g.protected
            else list(range(g.channels)) for g in groups]
    small = slicing.sliced(network, groups, kept)
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = closed(network, groups, kept)(x)
        assert torch.allclose(small(x), wanted, atol=1e-5 * float(wanted.abs().max()))
    assert int(groups.macs(np.array([len(own) for own in kept]))) == cost.count(small, X).macs
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in network.parameters())
    small.train()(x).sum().backward()


def closed(network: nn.Module, groups, kept) -> nn.Module:
    """A copy whose consumers have zero weights for the channels that go."""
    network = copy.deepcopy(network)
    for group, channels in zip(groups, kept):
        dead = sorted(set(range(group.channels)) - set(channels))
        for member in group.with_role("consumer"):
            weight, axis = network.get_submodule(member.layer).weight.data, dict(member.cuts)["weight"]
            weight.index_fill_(axis, torch.tensor([i % weight.shape[axis] for i in member.of(dead)]), 0)
    return network


class Echo(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.call, self.hill, self.vale, self.out = conv(3, 8), conv(8, 8), conv(8, 8), nn.Linear(8, 10)
        self.vale.weight = self.hill.weight

    def forward(self, x):
        return pooled(self, self.vale(F.relu(self.hill(F.relu(self.call(x))))))


def steps_of_eight(network, x):
    parts, last, seen = F.relu(network.a(x)).split(8, 1), 0, []
    for part in parts:
        last = network.b(last + part)
        seen.append(last)
    return pooled(network, torch.cat(seen, 1))


WHOLE = {
    "literal_sizes": (lambda: Of(lambda net, x: net.out(F.relu(net.a(x)).reshape(-1, 2048)), a=conv(3, 8),
                                 out=nn.Linear(2048, 10)), "a",
                      "in evaluation mode the network does not run .*x.shape"),
    "literal_split": (lambda: Of(steps_of_eight, a=conv(3, 16), b=conv(8, 8), out=nn.Linear(16, 10)), "a",
                      "b is called 2 times"),
    "tied": (Echo, "call", "hill.weight is also vale.weight"),
    "mean_over_channels": (lambda: Of(lambda net, x: pooled(net, net.b((y := net.a(x)) * y.mean(1, keepdim=True))),
                                      a=conv(3, 8), b=conv(8, 8), **OUT), "a", "takes the mean over channels"),
    "softmax_over_channels": (lambda: Of(lambda net, x: pooled(net, net.b(net.a(x).softmax(1))), a=conv(3, 8),
                                         b=conv(8, 8), **OUT), "a", "softmax over channels"),
    "a_constant_per_channel": (lambda: Of(lambda net, x: pooled(net, net.b(net.a(x) * torch.ones(1, 8, 1, 1))),
                                          a=conv(3, 8), b=conv(8, 8), **OUT), "a", "no such channels"),
    "one_norm_group": (lambda: ended(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 6), features=6), "0", "all hang together"),
    "recurrent": (lambda: Of(lambda net, x: net.out(net.rnn(net.a(x).mean(2).permute(0, 2, 1))[0][:, -1]),
                             a=conv(3, 8), rnn=nn.GRU(8, 6, batch_first=True), out=nn.Linear(6, 10)), "a",
                  "GRU rnn multiplies by its own|uses the operation"),
    "weight_standardisation": (lambda: ended(conv(3, 8), Levelled(8, 6, 3, padding=1), features=6), "0",
                               "something else than with masked channels"),
    "bare_weight": (lambda: Of(lambda net, x: pooled(net, torch.einsum("bchw,oc->bohw", net.a(x), net.w)),
                               a=conv(3, 6), w=nn.Parameter(torch.randn(8, 6)), **OUT), "a", "multiplies by its own w"),
    "neighbours": (lambda: Of(lambda net, x: pooled(net, net.b((y := net.a(x)) * net.eca(
        y.mean((2, 3))[:, None])[:, 0, :, None, None])), a=conv(3, 8), eca=nn.Conv1d(1, 1, 3, padding=1), b=conv(8, 8),
        **OUT), "a", "no such channels"),
    "attention_heads": (lambda: Of(attended, a=conv(3, 8), q=conv(8, 4, 1), k=conv(8, 4, 1), v=conv(8, 8, 1), **OUT),
                        "q", "multiplies activations with activations"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_these_stay_whole_with_the_reason(kind):
    make, name, reason = WHOLE[kind]
    torch.manual_seed(0)
    groups = surgery.groups(make().eval(), X)
    stays = groups.named(name)
    assert re.search(reason, stays.protected), stays.protected
    assert stays.protected in str(groups) and not stays.with_role("consumer")
    with pytest.raises(UserError, match="cannot lose filters"):
        surgery.PhysicalPruner(make().eval(), X).prune({name: [0]})


def test_layer_norms_take_their_statistics_over_what_is_left():
    torch.manual_seed(0)
    network = ended(conv(3, 12), ChannelsLastNorm(12), nn.GELU(), features=12).eval()
    nn.init.uniform_(network[1].weight)
    nn.init.uniform_(network[1].bias)
    groups, x = surgery.groups(network, X), torch.randn(3, 3, 16, 16)
    assert [group.name for group in groups if not group.protected] == ["0"]
    small = slicing.sliced(network, groups, [[1, 4, 5, 9]])
    y = F.layer_norm(network[0](x)[:, [1, 4, 5, 9]].permute(0, 2, 3, 1), [4], network[1].weight[[1, 4, 5, 9]],
                     network[1].bias[[1, 4, 5, 9]])
    wanted = F.gelu(y).mean((1, 2)) @ network[-1].weight[:, [1, 4, 5, 9]].T + network[-1].bias
    assert small[1].normalized_shape == (4,) and torch.allclose(small(x), wanted, atol=1e-5)


def test_what_runs_in_training_only_is_cut_with_its_inputs():
    def forward(net, x):
        y = net.base(x)
        main = pooled(net, net.lamp(F.relu(y)))
        return (main, net.side(y.mean((2, 3)))) if net.training else main

    torch.manual_seed(0)
    network = Of(forward, base=conv(3, 12), lamp=conv(12, 8), side=nn.Linear(12, 10), **OUT).eval()
    groups = surgery.groups(network, X)
    small = slicing.sliced(network, groups, [[0, 3, 4], list(range(8))])
    assert small.side.in_features == 3
    main, side = small.train()(torch.randn(2, 3, 16, 16))
    assert main.shape == side.shape == (2, 10)
    assert not groups.dense_macs - cost.count(network.eval(), X).macs


def test_a_fault_in_training_mode_alone_is_found():
    def forward(net, x):
        y = F.relu(net.a(x))
        return pooled(net, net.b(y.reshape(-1, 8, 16, 16) if net.training else y))

    torch.manual_seed(0)
    groups = surgery.groups(Of(forward, a=conv(3, 8), b=conv(8, 8), **OUT).eval(), X)
    assert "in training mode the network does not run" in groups.named("a").protected
    assert not groups.named("b").protected


def test_frozen_parameters_stay_frozen():
    torch.manual_seed(0)
    network = ended(conv(3, 12), nn.ReLU(), conv(12, 8), features=8)
    network[0].requires_grad_(False)
    small = surgery.PhysicalPruner(network, X).prune({"0": [1, 2], "2": [0]})
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in network.parameters()]


def test_tokens_that_are_not_sorted_by_image_are_not_scored():
    def forward(net, x):
        tokens = net.a(x).flatten(2).permute(2, 0, 1)  # positions first, as old transformers have it
        return net.out(F.relu(net.fc(tokens)).mean(0))

    torch.manual_seed(0)
    groups = surgery.groups(Of(forward, a=conv(3, 6), fc=nn.Linear(6, 8), out=nn.Linear(8, 10)).eval(), X)
    assert "image after image" in groups.named("a").protected and not groups.named("fc").protected


def test_groups_of_a_network_in_training_mode_leave_it_as_it_was():
    torch.manual_seed(0)
    network = ended(conv(3, 12), nn.BatchNorm2d(12), nn.Dropout(0.5), conv(12, 8), features=8).train()
    network[1].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    surgery.groups(network, X)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_layer_with_a_keyword_is_refused():
    network = Of(lambda net, x: pooled(net, net.a(input=x)), a=conv(3, 8), **OUT).eval()
    with pytest.raises(UserError, match=r"'a' of Of gets its input by keyword.*call a\(x\)"):
        surgery.groups(network, X)


def test_an_operation_in_a_form_that_no_rule_foresees_keeps_its_channels(monkeypatch):
    def unforeseen(*_):
        raise IndexError("a form of relu")

    monkeypatch.setitem(rules.RULES, "relu", unforeseen)
    groups = surgery.groups(ended(conv(3, 8), nn.ReLU(), conv(8, 6), features=6).eval(), X)
    assert "uses 'relu' in a form that is not followed (IndexError)" in groups.named("0").protected
    assert not groups.named("2").protected


def chained() -> dict[str, nn.Module]:
    return {"first": conv(3, 8), "second": conv(8, 6), "out": nn.Linear(6, 5)}


def in_a_row(network, x):
    return pooled(network, network.second(F.relu(network.first(x))))


def storing() -> Of:
    """A hook that keeps a feature for a later part, in the one network that it was made for."""
    network = Of(lambda n, x: (n.second(F.relu(n.first(x))), pooled(n, n.kept["second"]))[1], kept={}, **chained())
    network.second.register_forward_hook(lambda _layer, _inputs, out: network.kept.__setitem__("second", out))
    return network


def scaled_by_a_hook() -> Of:
    network = Of(in_a_row, scale=nn.Parameter(torch.rand(8)), **chained())
    network.first.register_forward_hook(lambda _layer, _inputs, out: out * network.scale.view(1, -1, 1, 1))
    return network


def replaced() -> Of:
    network = Of(in_a_row, **chained())
    own = network.second.forward
    network.second.forward = lambda x: 2 * own(x)
    return network


class Extra(Of):
    """Saves more than its tensors."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


class Prefixed(Of):
    """Saves its tensors under other names."""

    def state_dict(self, *args, **kwargs):
        return {f"module.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


@pytest.mark.parametrize(("made", "message"), [
    (storing, "a copy of it gives something else than itself: a hook, or a function that was set on a module, keeps"),
    (scaled_by_a_hook, "a copy of it goes on using 'scale' of the original"),
    (replaced, "a copy of it goes on using 'second.weight' of the original"),
    (lambda: Extra(in_a_row, **chained()), "its state_dict has '_extra_state', which is none of its parameters"),
    (lambda: Prefixed(in_a_row, **chained()), "its state_dict has 'module.first.weight', which is none"),
])
def test_a_network_whose_copy_is_not_itself_is_refused(made, message):
    network = made().eval()
    with pytest.raises(UserError, match=message):
        surgery.groups(network, X)
    with pytest.raises(UserError, match=message):
        hobs_rspar.compress(network, [(torch.randn(8, 3, 16, 16), torch.randint(5, (8,)))], method="l1")


def test_the_check_sees_images_with_the_values_of_the_example():
    """A logarithm has no negative ones, an embedding whole ones, and a branch may hang on their range."""
    positive, whole = X.abs() + 0.1, (60 * X.abs()).clamp(0, 255)
    logarithm = Of(lambda n, x: in_a_row(n, x.log()), **chained()).eval()
    table = chained() | {"first": conv(6, 8), "table": nn.Embedding(256, 6)}
    embedded = Of(lambda n, x: in_a_row(n, n.table(x[:, 0].long()).permute(0, 3, 1, 2)), **table).eval()
    for network, example in ((logarithm, positive), (embedded, whole)):
        assert [group.protected for group in surgery.groups(network, example)] == ["", ""]
    branched = Of(lambda n, x: pooled(n, n.second((y := F.relu(n.first(x))) / (y.shape[1] if x.mean() > 5 else 1))),
                  **chained()).eval()
    assert not surgery.groups(branched, X).named("first").protected
    assert "with masked channels" in surgery.groups(branched, X + 20).named("first").protected


def test_a_forward_that_changes_its_input_leaves_the_example_as_it_was():
    network, example = Of(lambda n, x: in_a_row(n, x.sub_(1)), **chained()).eval(), X.clone()
    assert [group.protected for group in surgery.groups(network, example)] == ["", ""]
    assert torch.equal(example, X)

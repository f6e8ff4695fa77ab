"""The wide view of batch norm equals PyTorch's batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hobs_rspar import batchnorm, networks, training
from small import images, recipe


@pytest.mark.parametrize("channels,size", [(8, 28), (7, 5), (33, 7), (2, 4)])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_output_gradients_and_running_statistics_equal_pytorchs(channels, size, dtype, tolerance):
    random = torch.Generator().manual_seed(channels)
    x = (3 * torch.randn(16, channels, size, size, generator=random) + 1).to(dtype, memory_format=torch.channels_last)
    gradient = torch.randn(x.shape, generator=random).to(dtype)
    ours, theirs = (nn.BatchNorm2d(channels) for _ in range(2))
    for part in ours.parameters():
        nn.init.uniform_(part, 0.5, 1.5, generator=random)
    theirs.load_state_dict(ours.state_dict())
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = batchnorm.batch_norm(ours, a), theirs(b)
    out.backward(gradient)
    expected.backward(gradient)
    pairs = [(out, expected), (a.grad, b.grad), *((p.grad, q.grad) for p, q in zip(ours.parameters(),
                                                                                   theirs.parameters())),
             *zip(ours.buffers(), theirs.buffers())]
    for seen, wanted in pairs:
        assert (seen - wanted).abs().max() <= tolerance * wanted.abs().max().clamp_min(1)
    assert out.dtype == expected.dtype and out.stride() == expected.stride()


def test_a_network_trains_alike_inside_and_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setattr(batchnorm, "LARGE", 0)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    plain = plain.to(memory_format=torch.channels_last)
    wide, x = copy.deepcopy(plain), torch.randn(8, 1, 8, 8)
    plain(x).sum().backward()
    with batchnorm.wide_batchnorm(wide):
        wide(x).sum().backward()
    assert "forward" not in vars(wide[1])
    for seen, wanted in zip(wide.parameters(), plain.parameters()):
        assert torch.allclose(seen.grad, wanted.grad, atol=1e-4, rtol=1e-4)
    assert torch.allclose(wide[1].running_var, plain[1].running_var)


def test_evaluation_takes_pytorchs_own(monkeypatch):
    monkeypatch.setattr(batchnorm, "LARGE", 0)
    monkeypatch.setattr(batchnorm, "batch_norm", lambda *_: pytest.fail("the wide view is for training"))
    norm = nn.BatchNorm2d(3).eval()
    with batchnorm.wide_batchnorm(norm):
        norm(torch.randn(2, 3, 4, 4))


def test_activations_in_place_behind_a_large_norm_give_pytorchs_gradients():
    """More than 2^18 elements, where the wide view pays: 32 x 24 x 24 x 24."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.AvgPool2d(24),
                          nn.Flatten(), nn.Linear(24, 5)).to(memory_format=torch.channels_last)
    wide = copy.deepcopy(plain)
    wide[2].inplace = True
    x, labels = torch.randn(32, 3, 26, 26).to(memory_format=torch.channels_last), torch.randint(5, (32,))
    nn.functional.cross_entropy(plain(x), labels).backward()
    taken = []
    with batchnorm.wide_batchnorm(wide):
        wide[1].register_forward_hook(lambda norm, inputs, _out: taken.append(batchnorm._pays(norm, inputs[0])))
        nn.functional.cross_entropy(wide(x), labels).backward()
    assert taken == [True]
    for seen, wanted in zip(wide.parameters(), plain.parameters()):
        assert torch.allclose(seen.grad, wanted.grad, atol=1e-6, rtol=1e-3)
    assert torch.allclose(wide[1].running_mean, plain[1].running_mean, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0"])
def test_torchvisions_networks_train_alike_with_the_wide_view(name, monkeypatch):
    """One step of the training loop; their first norms have more than 2^18 elements."""
    monkeypatch.setattr(batchnorm, "VECTOR", 10**6)  # 64 channels would be left to PyTorch's own
    data, count = images(24, 3, 32, 10), 24
    options = recipe(epochs=1, images=None, batch_size=count, crops=[], warmup=0.0, learning_rate=1e-3)
    grown = {}
    for large in (2**18, 2**62):
        monkeypatch.setattr(batchnorm, "LARGE", large)
        network, calls = networks.build(networks.NetworkSpec(name, 10, 3, 32), seed=1), []
        own = batchnorm.batch_norm
        with monkeypatch.context() as patch:
            patch.setattr(batchnorm, "batch_norm", lambda *them, own=own, calls=calls: calls.append(1) or own(*them))
            torch.manual_seed(0)  # dropout
            training.fit(training.Task(network, data, data.first(4), options, 0, "test"), training.State(),
                         lambda now: None)
        assert bool(calls) == (large == 2**18)
        grown[large] = network.state_dict()
    for key, seen in grown[2**18].items():
        assert torch.allclose(seen.float(), grown[2**62][key].float(), atol=1e-3, rtol=1e-2), key

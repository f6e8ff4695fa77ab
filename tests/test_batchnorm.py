"""The wide view of batch norm equals PyTorch's batch norm."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hobs_rspar import batchnorm


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

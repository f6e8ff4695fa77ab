"""Patches of every kind of layer against the layer itself; their second moments in blocks and in parts."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hobs_rspar.curvature import factors as factors_module
from hobs_rspar.curvature import kfac as kfac_module
from hobs_rspar.curvature.factors import column_blocks, input_diagonal
from hobs_rspar.curvature.kfac import Wanted
from hobs_rspar.curvature.patches import output_rows, patches, reproduces, sampled_positions
from test_curvature import Levelled, factors_of, seed

KINDS = {
    "same": nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(1, 3)),
    "valid": nn.Conv2d(4, 6, (3, 2), padding="valid", stride=2),
    "reflect": nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect", stride=(2, 1)),
    "replicate": nn.Conv2d(4, 6, 3, padding=1, padding_mode="replicate", dilation=2),
    "circular": nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2, bias=False),
    "depthwise, two each": nn.Conv2d(4, 8, 3, padding="same", groups=4, padding_mode="reflect"),
    "one dimension": nn.Conv1d(4, 6, 3, padding=1, stride=2),
    "one dimension, same": nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular", groups=2),
    "features": nn.Linear(4, 6),
    "tokens": nn.Linear(4, 6),
    "maps": nn.Linear(4, 6, bias=False),
}
SHAPES = {"one dimension": (3, 4, 11), "one dimension, same": (3, 4, 11), "features": (3, 4), "tokens": (3, 5, 4),
          "maps": (3, 4, 4, 4)}


def kind(name: str) -> tuple[nn.Module, torch.Tensor]:
    return KINDS[name], torch.randn(SHAPES.get(name, (3, 4, 9, 8)), generator=seed())


def multiplied(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What a layer's weight and bias make of its patches [rows, outputs]."""
    weight = layer.weight.reshape(len(rows), -1, rows.shape[-1] - 1)
    out = (rows[..., :-1] @ weight.mT).transpose(0, 1).flatten(1)
    return out if layer.bias is None else out + layer.bias


@torch.no_grad()
@pytest.mark.parametrize("name", list(KINDS))
def test_weight_times_patches_is_the_layers_own_output(name):
    layer, x = kind(name)
    out = layer(x)
    every = patches(layer, x, None)
    assert every[1] == 1 and torch.equal(every[0][..., -1], torch.ones_like(every[0][..., -1]))
    assert torch.allclose(multiplied(layer, every[0]), output_rows(layer, out, None), atol=1e-5)
    count = out.numel() // (3 * 8 if name.startswith("depthwise") else 3 * 6)
    assert len(every[0][0]) == 3 * count
    where = sampled_positions(layer, x, max(1, count - 2), seed(1))
    if name == "features":
        assert where is None
        return
    some, scale = patches(layer, x, where)
    assert scale == count / (count - 2) and len(where) == count - 2 and len(some[0]) == 3 * (count - 2)
    assert torch.allclose(multiplied(layer, some), output_rows(layer, out, where), atol=1e-5)
    assert reproduces(layer, x, out) == ""


@torch.no_grad()
@pytest.mark.parametrize("name", ["grouped", "features", "one dimension"])
def test_rows_of_several_to_an_image_are_its_positions(name):
    layer, x = kind(name)
    x = torch.cat([x, 2 * x])
    for where in (None, torch.tensor([1, 2, 0])):
        rows, scale = patches(layer, x, where, images=2)
        assert torch.allclose(multiplied(layer, rows), output_rows(layer, layer(x), where, images=2), atol=1e-5)
    assert len(rows[0]) == 6 and scale == layer(x).numel() // 12 / 3
    assert sampled_positions(layer, x, 2, seed(), images=2).tolist() == sorted(
        sampled_positions(layer, x, 2, seed(), images=2).tolist())


class Lopsided(nn.Conv2d):
    """Pads at the bottom and to the right only."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("layer, shape, why", [
    (Lopsided(3, 5, 3), (2, 3, 8, 8), "Lopsided has a forward of its own"),
    (Lopsided(3, 5, 3, padding=1, stride=2), (2, 3, 8, 8), "Lopsided has a forward of its own"),
    (Levelled(3, 5, 3), (2, 3, 8, 8), "Levelled has a forward of its own"),
    (Doubled(3, 5), (2, 3), "Doubled has a forward of its own"),
    (nn.ConvTranspose2d(3, 5, 2), (2, 3, 8, 8), "a transposed convolution"),
    (nn.Conv3d(3, 5, 2), (2, 3, 8, 8, 4), "a 3-D convolution"),
    (nn.Bilinear(3, 3, 5), (2, 3), "a Bilinear is neither a convolution nor a linear layer"),
])
def test_layers_that_do_something_else_are_told(layer, shape, why):
    x = torch.randn(shape, generator=seed())
    assert reproduces(layer, x, layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x)).startswith(why)


def test_what_cannot_be_compared_is_told_and_nothing_is_raised():
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 8, 8, generator=seed())
    assert "output is not that of a plain Conv2d" in reproduces(layer, x[:, :2], layer(x))
    assert "output is not that of a plain Conv2d" in reproduces(layer, x, layer(x) + 1)
    assert reproduces(layer, x, layer(x) * torch.nan) == "it gives values that are not finite"
    assert "not that of a plain Conv2d" in reproduces(layer, x, layer(x).flatten())
    half = copy.deepcopy(layer).bfloat16()
    assert reproduces(half, x.bfloat16(), half(x.bfloat16())) == ""
    circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    wide = torch.randn(1, 1, 90, 90, generator=seed())
    assert reproduces(circular, wide, circular(wide)) == ""  # more positions than are compared
    assert reproduces(circular, wide, F.conv2d(wide, circular.weight, circular.bias, padding=1))  # wrong at edges only


# --- blocks of very wide layers

def wide(groups: int = 1) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layer = nn.Conv2d(10 * groups, 4, (1, 2), groups=groups, bias=False) if groups > 1 else nn.Linear(20, 4)
    x = torch.randn(6, 20, *((1, 2) if groups > 1 else ()), generator=seed())
    return layer, x, torch.randn(layer(x).shape, generator=seed(1))


@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_of_a_wide_layer_are_those_of_its_whole_factor(groups, monkeypatch):
    layer, x, gradient = wide(groups)
    whole = factors_of(layer, x, gradient)
    channels = torch.arange(20) % 5  # as of a map that was flattened channels last
    monkeypatch.setattr(factors_module, "WHOLE", 12)
    monkeypatch.setattr(factors_module, "BLOCK", 9)
    blocks = factors_of(layer, x, gradient, wanted=Wanted({"0": channels}, True))
    a, columns = blocks.input_factor("0"), blocks.factors["0"].columns
    assert sorted(columns[columns >= 0].tolist()) == list(range(20))
    number = len(columns)
    for g in range(groups):
        for i, own in enumerate(columns):
            rows = [*own[own >= 0].tolist(), 20]
            places = [*range(len(rows) - 1), a.shape[1] - 1]
            block = a[g * number + i]
            assert torch.allclose(block[places][:, places], whole.input_factor("0")[g][rows][:, rows], atol=1e-5)
            assert int((block != 0).sum()) == int((block[places][:, places] != 0).sum())
    assert torch.allclose(input_diagonal(blocks.stored(), "0", layer),
                          whole.input_factor("0").diagonal(dim1=1, dim2=2), atol=1e-5)
    assert torch.allclose(blocks.compute_fisher_diagonal("0"), whole.compute_fisher_diagonal("0"), atol=1e-5)
    assert torch.equal(blocks.stored()["0/columns"], columns)


def test_blocks_hold_whole_channels(monkeypatch):
    monkeypatch.setattr(factors_module, "WHOLE", 12)
    monkeypatch.setattr(factors_module, "BLOCK", 9)
    layer = nn.Linear(20, 4)
    assert column_blocks(nn.Linear(12, 4), None) is None
    columns = column_blocks(layer, torch.arange(20) % 5)
    assert columns.tolist() == [[0, 5, 10, 15, 1, 6, 11, 16], [2, 7, 12, 17, 3, 8, 13, 18],
                                [4, 9, 14, 19, -1, -1, -1, -1]]
    assert column_blocks(layer, torch.arange(20) // 10).tolist() == [list(range(10)), list(range(10, 20))]  # none fits
    assert column_blocks(layer, None).tolist() == [[*range(9)], [*range(9, 18)], [18, 19, *[-1] * 7]]
    assert column_blocks(nn.Conv2d(10, 4, (1, 2)), torch.arange(10) // 4).tolist() == [
        [*range(8)], [*range(8, 16)], [16, 17, 18, 19, *[-1] * 4]]


def test_patches_are_gathered_a_few_images_at_a_time(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(7, 3, 9, 9, generator=seed())
    gradient = torch.randn(layer(x).shape, generator=seed(1))
    wanted, sizes = factors_of(layer, x, gradient, positions=10, generator=seed()), []
    monkeypatch.setattr(kfac_module, "ROWS_BYTES", 2 * 10 * 28 * 4)
    monkeypatch.setattr(kfac_module, "patches",
                        lambda layer, x, *more: sizes.append(len(x)) or patches(layer, x, *more))
    seen = factors_of(layer, x, gradient, positions=10, generator=seed())
    assert sizes == [2, 2, 2, 1] and torch.allclose(seen.input_factor("0"), wanted.input_factor("0"), atol=1e-4)

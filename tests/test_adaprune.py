"""Masked sparsity: even over the groups of an accelerator, exact in MACs, and kept through training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import hobs_rspar
from hobs_rspar import adaprune, cost
from hobs_rspar.errors import UserError
from small import ZOO, Mixed, assert_same, images, seeded, snapshot, zoo


def counts(mask: torch.Tensor, axis: int, group: int) -> list[torch.Tensor]:
    """Weights that stay in every group along an axis."""
    return [part.sum(0) for part in mask.movedim(axis, 0).flatten(1).long().split(group)]


@pytest.mark.parametrize("direction,kept", [("input", 0.26), ("output", 0.5)])
@pytest.mark.parametrize("name", ZOO)
def test_contract_over_the_zoo(name, kept, direction):
    network, example = zoo(name), ZOO[name].example()
    before = snapshot(network)
    masks = adaprune.masks(network, example, kept, direction)
    assert adaprune.kept_macs(network, example, masks) == pytest.approx(kept, rel=0.01)
    again = adaprune.masks(network, example, kept, direction)
    assert all(torch.equal(mask, again[layer]) for layer, mask in masks.items())
    assert_same(snapshot(network), before)
    assert masks.keys() == cost.layer_macs(network, example).keys()
    for layer, mask in masks.items():  # whole groups differ by one weight at most, and none is empty
        found = torch.cat(counts(mask, adaprune.AXES[direction], 16)[:mask.shape[adaprune.AXES[direction]] // 16] or
                          [mask.sum(adaprune.AXES[direction]).flatten()])
        assert found.min() >= 1 and found.max() - found.min() <= 1, layer


def test_the_largest_weights_of_a_group_stay():
    layer = nn.Conv2d(8, 3, 1, bias=False)
    masks = adaprune.masks(nn.Sequential(layer), torch.zeros(1, 8, 2, 2), 0.5, "input", group=4)["0"]
    for outputs in range(3):
        for part in range(2):
            weights = layer.weight[outputs, 4 * part:4 * part + 4, 0, 0].abs()
            assert set(torch.nonzero(masks[outputs, 4 * part:4 * part + 4, 0, 0]).flatten().tolist()) == \
                set(weights.topk(2).indices.tolist())


def test_groups_lie_along_the_channels_that_are_fetched_together():
    weight = torch.ones(4, 4, 1, 1)
    weight[0] = weight[:, 0] = 9  # a large row and a large column: along the other axis each group has one of them
    layer = nn.Conv2d(4, 4, 1, bias=False)
    layer.weight.data = weight
    network, example = nn.Sequential(layer), torch.zeros(1, 4, 2, 2)
    along_inputs, along_outputs = (adaprune.masks(network, example, 0.25, direction, 4)["0"]
                                   for direction in ("input", "output"))
    assert along_inputs[1:, 0].all() and not along_inputs[1:, 1:].any()
    assert along_outputs[0, 1:].all() and not along_outputs[1:, 1:].any()


def test_what_is_left_of_the_budget_goes_where_most_is_retained_for_its_macs():
    """By brute force over all groups that might keep one more weight; the second layer's weights cost four times."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 2, 1, stride=2, bias=False), nn.Conv2d(2, 3, 1, padding=1, bias=False))
    example = torch.zeros(1, 4, 1, 1)
    first, second = ((layer.weight**2 / (layer.weight**2).sum()).detach().flatten(1).sort(1, True).values
                     for layer in network)
    prices = [1] * 2 + [9] * 3  # MACs of a weight: of a 1x1 and of a 3x3 output
    assert sum(cost.layer_macs(network, example).values()) == 8 + 9 * 6
    masks = adaprune.masks(network, example, (4 + 9 * 3 + 10) / 62, "input", group=4)  # two of four, one of two, and 10
    kept = [mask.flatten(1).sum(1) for mask in masks.values()]
    more = torch.cat([kept[0] - 2, kept[1] - 1]).tolist()
    gains = torch.cat([first[:, 2], second[:, 1] / 9]).tolist()
    order = sorted(range(5), key=lambda i: -gains[i])
    wanted, left = [0] * 5, 10
    for index in order:
        if prices[index] > left:
            break
        wanted[index], left = 1, left - prices[index]
    assert more == wanted


def test_zeros_stay_zero_through_training_and_the_others_are_trained():
    network = seeded(Mixed)
    masks = adaprune.masks(network.eval(), images(1).pixels.float()[:1], 0.5)
    adaprune.hold(network, masks)
    before = copy.deepcopy(network)
    descent = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        descent.zero_grad()
        F.cross_entropy(network(torch.randn(8, 2, 9, 9)), torch.randint(4, (8,))).backward()
        descent.step()
        adaprune.hold(network, masks)
    for layer, mask in masks.items():
        weight = network.get_submodule(layer).weight
        assert not weight[~mask].any() and weight[mask].ne(before.get_submodule(layer).weight[mask]).any()


def test_published_function():
    model = seeded(Mixed)
    loader = DataLoader(TensorDataset(torch.randn(8, 2, 9, 9), torch.randint(4, (8,))), batch_size=4)
    before = snapshot(model)
    pruned = hobs_rspar.adaprune_prune(model, loader, pruning_ratio=0.5, direction="output", group=4)
    assert_same(snapshot(model), before)
    kept = {name: (layer.weight != 0).double().mean().item() for name, layer in pruned.named_modules()
            if isinstance(layer, cost.LAYERS)}
    macs = cost.layer_macs(model, torch.zeros(1, 2, 9, 9))
    assert sum(macs[name] * kept[name] for name in macs) == pytest.approx(0.5 * sum(macs.values()), rel=0.01)
    assert cost.count(pruned, torch.zeros(1, 2, 9, 9)) == cost.count(model, torch.zeros(1, 2, 9, 9))


@pytest.mark.parametrize("arguments,message", [
    ({"direction": "rows"}, "direction is 'rows'; allowed: input, output"),
    ({"group": 1}, "group must be 2 or more"),
    ({"pruning_ratio": 1.0}, r"within \(0, 1\]; seen: 16, 0"),
    ({"pruning_ratio": 0.99}, "one weight in every group of 16 along the input channels"),
])
def test_bad_arguments(arguments, message):
    loader = DataLoader(TensorDataset(torch.randn(8, 2, 9, 9), torch.randint(4, (8,))), batch_size=4)
    with pytest.raises(UserError, match=message):
        hobs_rspar.adaprune_prune(Mixed(), loader, **arguments)


class Upwards(nn.Module):
    """A transposed convolution, whose weight has its inputs first, and products of activations, which have none."""

    def __init__(self):
        super().__init__()
        self.up, self.out = nn.ConvTranspose2d(4, 8, 2, 2, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        y = self.up(x).flatten(2)
        return self.out((y @ y.mT @ y).mean(2))


@pytest.mark.parametrize("direction,axis", [("input", 0), ("output", 1)])
def test_groups_of_a_transposed_convolution_lie_along_its_own_axes(direction, axis):
    network, example = Upwards(), torch.randn(1, 4, 3, 3)
    masks = adaprune.masks(network, example, 0.5, direction, group=4)
    assert set(masks) == {"up", "out"} and adaprune.kept_macs(network, example, masks) == pytest.approx(0.5, rel=0.02)
    found = torch.cat(counts(masks["up"], axis, 4))
    assert found.min() >= 1 and found.max() - found.min() <= 1
    copied = hobs_rspar.adaprune_prune(network, [(example.repeat(2, 1, 1, 1), torch.tensor([0, 1]))], 0.5, group=4)
    assert (copied.up.weight == 0).any() and (network.up.weight != 0).all()


def test_only_what_can_be_copied_and_run_is_masked():
    loader = [(torch.randn(2, 3, 9, 9), torch.tensor([0, 1]))]
    with pytest.raises(UserError, match="'stem' takes 2 channels"):
        hobs_rspar.adaprune_prune(Mixed(), loader)
    with pytest.raises(UserError, match=r"'stem.weight' is bfloat16, .* give model.float\(\)"):
        hobs_rspar.adaprune_prune(Mixed().bfloat16(), loader)

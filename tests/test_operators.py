"""Operators of a forward pass: as many multiply-accumulates and bytes as counted elsewhere, under the right roof."""

import pytest
import torch

from hobs_rspar import cost
from hobs_rspar.evidence.roofline_figure import line
from hobs_rspar.evidence.speed import roof
from hobs_rspar.hardware import operators, physics, timing
from small import ZOO, zoo

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn_cifar", "mobilenet_v2", "efficientnet_b0"])
def test_every_mac_and_byte_is_some_operators(name):
    network, batch = timing.prepared(zoo(name), CPU), 2
    x = timing.example((batch, *ZOO[name].example().shape[1:]), CPU)
    calls, = operators.profile([network], x, rounds=1)
    counted = cost.layer_macs(network, ZOO[name].example())
    found: dict[str, int] = {}
    for call in calls:
        if call.macs:
            found[call.layer] = found.get(call.layer, 0) + call.macs
    assert found == {layer: batch * macs for layer, macs in counted.items()}
    assert sum(call.bytes for call in calls) == pytest.approx(physics.traffic(network, x), rel=1e-9)
    assert all(call.milliseconds > 0 for call in calls)
    assert {"convolution", "batch norm", "activation", "linear"} <= {call.kind for call in calls}


def test_networks_take_turns_and_keep_their_order():
    small, large = timing.prepared(zoo("resnet8"), CPU), timing.prepared(zoo("resnet20"), CPU)
    x = timing.example((4, 1, 28, 28), CPU)
    first, second = operators.profile([small, large], x, rounds=2)
    assert len(first) < len(second)
    assert [call.layer for call in first if call.kind == "convolution"][0] == "conv1"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in large.modules())


def test_ceilings_and_roof():
    ceilings = operators.Ceilings.measured(CPU, trials=2)
    assert 1e8 < ceilings.macs < 1e14 and 1e8 < ceilings.bytes < 1e13
    known = {"macs": 100.0, "bytes": 20.0}
    assert [roof(known, intensity) for intensity in (1, 5, 50)] == [20, 100, 100]


def test_the_line_has_the_bend_where_arithmetic_begins_to_limit():
    known = {"macs": 100.0, "bytes": 20.0}
    points = [(intensity, roof(known, intensity)) for intensity in (1.0, 3.0, 20.0)]
    assert line(points) == [(1, 20), (5, 100), (20, 100)]
    assert line([(6.0, 100.0), (9.0, 100.0)]) == [(6, 100), (9, 100)]

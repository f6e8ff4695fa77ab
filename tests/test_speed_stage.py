"""The stage speed: every mode in fresh processes, folded networks compute the same, intervals on known answers."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from clones import ROOT
from hobs_rspar.errors import UserError
from hobs_rspar.hardware import modes
from hobs_rspar.hardware.modes import Mode, Seen
from small import ZOO, zoo
from test_benchmark_stage import CELL, change_params, study  # noqa: F401  (a fixture)

CPU = torch.device("cpu")


@pytest.fixture
def stage(study, monkeypatch):  # noqa: F811
    monkeypatch.syspath_prepend(str(ROOT / "pipeline"))
    change_params(speed__batch_sizes=[1, 4], speed__compiled=[], speed__seconds=0.05, speed__processes=2)
    import speed

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pipeline/speed.py", *arguments])
        speed.main()
    return run


def test_every_mode_and_every_operator(stage, capsys):
    stage(CELL)
    record = json.loads(Path(f"reports/tiny/cells/speed/{CELL}.json").read_text())
    assert [(row["run"], row["dtype"], row["batchnorm"], row["batch"]) for row in record["modes"]] == [
        ("eager", dtype, batchnorm, batch) for dtype in ("fp32", "bf16") for batchnorm in ("as trained", "folded")
        for batch in (1, 4)]
    for row in record["modes"]:
        if row["reason"]:
            assert row["dtype"] == "bf16" and "no bf16" in row["reason"]
            continue
        assert row["processes"] == len(row["by_process"]) == 2
        assert row["speedup_lo"] <= row["speedup"] <= row["speedup_hi"]
        assert row["pruned_p50_ms"] <= row["pruned_p90_ms"] <= row["pruned_p99_ms"]
    assert set(record["operators"]) == {"dense", "l1"} and record["ceilings"]["macs"] > 0
    assert f"speed {CELL}: " in capsys.readouterr().out


def test_an_unknown_cell_is_a_clear_error(stage):
    with pytest.raises(UserError, match="Did you mean 'l1-42'"):
        stage("l1-43")


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2", "efficientnet_b0", "vgg16_bn_cifar"])
def test_a_folded_copy_computes_the_same(name):
    network, x = copy.deepcopy(zoo(name)).double().eval(), ZOO[name].example().double().repeat(2, 1, 1, 1)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = modes.folded_copy(network, x[:1])
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_interval_resamples_processes_first():
    """Rounds that agree within a process, and processes that do not: the interval spans the processes."""
    pruned = np.ones((10, 3))
    seen = [Seen(speed * pruned, pruned) for speed in (2.0, 3.0, 4.0)]
    assert modes.over_processes(seen) == (3.0, 2.0, 4.0)
    assert modes.over_processes(seen[:1]) == (2.0, 2.0, 2.0)


def test_what_cannot_run_is_a_reason(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no compiler\nand more lines")
    monkeypatch.setattr(torch, "compile", broken)
    network, mode = zoo("resnet8").eval(), Mode("compiled", "fp32", "as trained", 2)
    plan = modes.Plan(network, network, (1, 28, 28), (mode,), 0.05, 1, CPU)
    threads = torch.get_num_threads()
    row = modes.row(mode, modes.one_process(plan))
    torch.set_num_threads(threads)
    assert row["reason"] == "not measured: RuntimeError: no compiler" and "speedup" not in row


def test_a_gpu_has_graphs_and_a_cpu_has_none():
    assert not any(mode.run == "cuda graph" for mode in modes.modes([1, 64], [64], CPU))
    gpu = modes.modes([1, 64], [64], torch.device("cuda"))
    assert sum(mode.run == "cuda graph" for mode in gpu) == 4 and sum(mode.run == "compiled" for mode in gpu) == 2

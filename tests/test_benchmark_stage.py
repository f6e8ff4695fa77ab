"""The stages benchmark and latency on a tiny study: both records, a single network, and every bad input."""

import base64
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hobs_rspar import checkpoint, cost
from hobs_rspar.errors import UserError
from hobs_rspar.networks import NetworkSpec, build
from hobs_rspar.surgery import groups

ROOT = Path(__file__).resolve().parents[1]
SPEC = NetworkSpec("resnet8", classes=10, in_channels=1, image_size=12)
CELL = "l1-42"
STEPS = {"cut": {"top1": 10.0, "reconstruction_error": 0.9}, "batchnorm": {"top1": 60.0, "reconstruction_error": 0.5},
         "refit": {"top1": 80.0, "reconstruction_error": 0.1}}
CURVE = [{"images": 0, "seen": 0, "top1_validation": 80.0, "top1_test": 79.0, "correct": "fw=="}]
TIMES = {"p50_ms", "p90_ms", "p99_ms", "mean_ms", "std_ms", "throughput", "iterations"}


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def half(dense):
    """``dense`` with half of its channels everywhere."""
    def cut(tensor):
        keep = tuple(slice(0, n if n in (1, 3, 10) else n // 2) for n in tensor.shape)
        return tensor[keep].clone()
    state = {name: cut(tensor) for name, tensor in dense.state_dict().items()}
    return checkpoint.fit(build(SPEC), state, "a test's network")


def change_params(**changes) -> None:
    """Changes params.yaml: ``section__key=value``."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    for name, value in changes.items():
        section, key = name.split("__")
        params[section][key] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """A study of one cell, as the stages before benchmark leave it; the working directory."""
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["study"] |= {"name": "tiny", "network": SPEC.name, "methods": ["l1"], "seeds": [42]}
    params["benchmark"] |= {"seconds": 0.3, "batch_sizes": [1, 4], "platform": None}
    params["device"] = "cpu"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    dense = build(SPEC)
    pruned = half(dense)
    write_stages(tmp_path, dense, pruned)
    return tmp_path


def write_stages(root: Path, dense, pruned) -> None:
    folder, cell = root / "artifacts/dense/fashion_mnist_resnet8", root / "artifacts/tiny/cells" / CELL
    checkpoint.save(folder / "dense.safetensors", dense, SPEC)
    checkpoint.save(cell / "recovered.safetensors", pruned, SPEC)
    before, after = (cost.count(network, SPEC.example()) for network in (dense, pruned))
    write(folder / "dense.json", {"macs": before.macs, "params": before.params, "top1_test": 93.1,
                                  "top1_validation": 93.5, "history": []})
    episode = {"episode": 0, "reward": -0.1, "accuracy_drop": 0.1, "penalty": 0.0, "lambda": 0.01,
               "raw_macs_ratio": 0.3, "macs_ratio": 0.26, "ratios": [0.5, 0.5]}
    write(cell / "plan.json", {
        "network": "resnet8", "dataset": "fashion_mnist", "method": "l1", "seed": 42, "budget": {"macs": 0.26},
        "macs": after.macs, "dense_macs": before.macs, "macs_ratio": after.macs / before.macs,
        "decided_by": "uniform", "repair": "least_squares",
        "groups": [{"name": "conv1", "channels": 16, "kept": list(range(8)), "reason": "budget"}],
        "search": {"evaluations": 7, "images": 70, "chosen": "best", "episodes": [episode]},
        "extra_training_images": 5})
    write(cell / "prune.json", {"macs": after.macs, "params": after.params, "repair": "least_squares",
                                "macs_ratio": after.macs / before.macs, "params_ratio": after.params / before.params,
                                "repair_steps": STEPS})
    write(cell / "recovery.json", {"history": [{"epoch": 1}], "top1_validation": 92.0, "top1_test": 91.0,
                                   "top5_test": 99.0, "test_images": 8, "training_images": 100,
                                   "precision": "fp32",
                                   "correct": base64.b64encode(b"\x7f").decode(), "recovery_curve": CURVE})


def script(name: str):
    """A script of pipeline/ as a module."""
    folder = str(ROOT / "pipeline")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def benchmark(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    script("benchmark").main()


def platform_file() -> Path:
    found, = Path("reports/tiny/platforms").glob("*/*.json")
    return found


def test_both_records(study, monkeypatch, capsys):
    write(study / f"artifacts/tiny/costs/{CELL}/prune.json", {"seconds": 2.5})
    benchmark(monkeypatch, "l1", "42")
    check_cell(json.loads((study / f"reports/tiny/cells/{CELL}.json").read_text()))
    check_platform(json.loads(platform_file().read_text()))
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(f"benchmark {CELL}: batch 4 ") and ", batch 1 " in line and "95 % interval" in line


def check_cell(record: dict) -> None:
    assert set(record) == {"cell", "method", "seed", "study", "dataset", "network", "budget", "dense", "plan",
                           "accuracy", "reconstruction_error", "repair", "repair_steps", "recovery_curve",
                           "precision", "test_images", "correct", "history", "search", "cost", "inputs"}
    assert record["precision"] == "fp32"
    assert record["repair_steps"] == STEPS and record["recovery_curve"] == CURVE
    assert set(record["dense"]) == {"macs", "params", "top1_test", "top1_validation"}
    assert record["plan"]["groups"] == [{"name": "conv1", "channels": 16, "kept_count": 8, "reason": "budget"}]
    assert record["plan"]["digest"] == checkpoint.digest(f"artifacts/tiny/cells/{CELL}/plan.json")
    assert record["accuracy"] == {"before_repair": 10.0, "after_repair": 80.0, "validation": 92.0, "test": 91.0,
                                  "test_top5": 99.0}
    assert "ratios" not in record["search"]["episodes"][0] and record["search"]["episodes"][0]["lambda"] == 0.01
    assert record["cost"] == {"training_images": 100, "extra_training_images": 5, "search_evaluations": 7,
                              "search_images": 70, "seconds": {"allocate": None, "prune": 2.5, "finetune": None}}
    assert len(record["inputs"]) == 64 and record["reconstruction_error"] == 0.1


def check_platform(record: dict) -> None:
    assert {"cell", "platform", "fingerprint", "conditions", "batches", "bounds", "peak_memory_mb", "energy",
            "energy_reason", "power_reason", "flags", "inputs"} <= set(record)
    assert record["platform"] == platform_file().parent.name and record["cell"] == CELL
    assert {"mode": "eager", "dtype": "fp32", "layout": "channels_last", "threads": 1,
            "batchnorm": "as trained"}.items() <= record["conditions"].items()
    assert list(record["batches"]) == ["1", "4"]
    for batch in record["batches"].values():
        assert set(batch["dense"]) == set(batch["pruned"]) == TIMES
        assert batch["speedup_lo"] <= batch["speedup"] <= batch["speedup_hi"]
    assert 1 < record["bounds"]["lo"] < record["bounds"]["hi"] and record["bounds"] == record["batches"]["4"]["bounds"]
    assert record["peak_memory_mb"] is None and record["peak_memory_reason"].startswith("not measured: ")
    assert record["energy"] is None and record["energy_reason"].startswith("not measured: ")


def test_the_cell_record_has_no_timing_and_is_the_same_twice(study, monkeypatch):
    record = study / f"reports/tiny/cells/{CELL}.json"
    benchmark(monkeypatch, "l1", "42")
    first = record.read_bytes()
    benchmark(monkeypatch, "l1", "42")
    assert record.read_bytes() == first


def test_the_dense_network_against_its_own_copy(study, monkeypatch):
    dense = build(SPEC)
    write_stages(study, dense, dense)
    benchmark(monkeypatch, "l1", "42")
    assert json.loads(platform_file().read_text())["bounds"] == {"lo": 1.0, "hi": 1.0}


def test_energy_and_memory_where_they_can_be_measured(study, monkeypatch):
    from hobs_rspar.hardware import cell, physics
    from hobs_rspar.hardware.energy import Energy
    monkeypatch.setattr(cell, "measure_energy", lambda calls, *_: {
        name: Energy(0.25 + index, 30.0, 10.0, "a test's") for index, name in enumerate(calls)})
    monkeypatch.setattr(physics, "peak_memory_mb", lambda network, x: 12.0)
    benchmark(monkeypatch, "l1", "42")
    record = json.loads(platform_file().read_text())
    assert record["energy"] == {"dense_j": 0.25, "pruned_j": 1.25, "per": "image", "batch": 4, "source": "a test's"}
    assert record["power"] == {"dense_w": 30.0, "pruned_w": 30.0, "idle_w": 10.0} and record["energy_reason"] is None
    assert record["peak_memory_mb"] == {"dense": 12.0, "pruned": 12.0} and record["peak_memory_reason"] is None


def test_another_platform_stops_before_measuring(study, monkeypatch):
    change_params(benchmark__platform="cuda_nvidia_h200")
    with pytest.raises(UserError, match="benchmark.platform is 'cuda_nvidia_h200', but this machine is 'cpu_"):
        benchmark(monkeypatch, "l1", "42")
    assert not Path("reports").exists()


@pytest.mark.parametrize(("missing", "command"), [("plan.json", "allocate"), ("recovered.safetensors", "finetune"),
                                                  ("prune.json", "prune"), ("recovery.json", "finetune")])
def test_a_missing_file_names_the_stage_that_makes_it(study, monkeypatch, missing, command):
    Path(f"artifacts/tiny/cells/{CELL}/{missing}").unlink()
    with pytest.raises(UserError, match=f"{missing} not found; run 'dvc repro {command}@{CELL}'"):
        benchmark(monkeypatch, "l1", "42")
    assert not Path("reports").exists()


def test_files_that_do_not_belong_together(study, monkeypatch):
    checkpoint.save(f"artifacts/tiny/cells/{CELL}/recovered.safetensors", build(SPEC), SPEC)
    with pytest.raises(UserError, match="the files are of different runs"):
        benchmark(monkeypatch, "l1", "42")
    plan = Path(f"artifacts/tiny/cells/{CELL}/plan.json")
    plan.write_text(plan.read_text().replace("resnet8", "resnet20"))
    with pytest.raises(UserError, match="plan.json: network is 'resnet20', but params.yaml and the command want "):
        benchmark(monkeypatch, "l1", "42")
    plan.write_text("{")
    with pytest.raises(UserError, match="plan.json is not valid JSON"):
        benchmark(monkeypatch, "l1", "42")


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "METHOD SEED"), (["l1"], "METHOD SEED"), (["l1", "42", "--checkpoint", "x"], "not both"),
    (["l3", "42"], "method 'l3' has no block in params.yaml. Did you mean 'l1'"),
])
def test_either_a_cell_or_a_checkpoint(study, monkeypatch, arguments, message):
    with pytest.raises(UserError, match=message):
        benchmark(monkeypatch, *arguments)


def test_a_single_network(study, monkeypatch, capsys):
    file = f"artifacts/tiny/cells/{CELL}/recovered.safetensors"
    benchmark(monkeypatch, "--checkpoint", file, "--batch-sizes", "1", "2", "--seconds", "0.1", "--json", "out/x.json")
    text, record = capsys.readouterr().out, json.loads(Path("out/x.json").read_text())
    assert record["macs"] == json.loads(Path(f"artifacts/tiny/cells/{CELL}/prune.json").read_text())["macs"]
    assert list(record["batches"]) == ["1", "2"] and set(record["batches"]["1"]) == TIMES
    for expected in ("resnet8", f"{record['params']:,} parameters", record["platform"], "p99", "images/s",
                     "energy: not measured: "):
        assert expected in text


@pytest.mark.parametrize(("content", "message"), [(None, "not found"), (b"\x10", "not a readable safetensors file"),
                                                  (b"PK\x03\x04 a pickle of another tool", "not a readable")])
def test_a_bad_checkpoint(study, monkeypatch, content, message):
    if content is not None:
        Path("x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        benchmark(monkeypatch, "--checkpoint", "x.safetensors")


def test_truncated_checkpoint_and_senseless_numbers(study, monkeypatch):
    file = Path(f"artifacts/tiny/cells/{CELL}/recovered.safetensors")
    with pytest.raises(UserError, match="each must be above 0"):
        benchmark(monkeypatch, "--checkpoint", str(file), "--batch-sizes", "0")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        benchmark(monkeypatch, "--checkpoint", str(file))


def test_errors_reach_the_user_without_a_traceback(study):
    done = subprocess.run([sys.executable, ROOT / "pipeline/benchmark.py", "--checkpoint", "nowhere.safetensors"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere.safetensors not found")
    assert "Traceback" not in done.stderr


def test_start_up_stays_light():
    """Eight seconds a cell leave no time for imports that only pruning and data need."""
    code = "import sys, benchmark; print(sorted({'torchvision', 'torch_pruning', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "pipeline", capture_output=True, text=True,
                          check=True)
    assert done.stdout == "[]\n"


def test_no_latency_table_when_the_budget_is_macs(study, capsys):
    script("latency").main()
    assert json.loads(Path("artifacts/tiny/latency.json").read_text()) == {"measured": False}
    assert capsys.readouterr().out == "latency tiny: not measured, because the budget is MACs\n"


def test_a_latency_table_when_the_budget_is_a_latency(study, capsys):
    from hobs_rspar.hardware.latency_table import LatencyTable
    change_params(study__budget={"macs": None, "latency_ms": None, "latency_ratio": 0.5}, latency__batch_size=2,
                  latency__rounds=1)
    write(study / "artifacts/dense/fashion_mnist_resnet8/groups.json", groups(build(SPEC), SPEC.example()).to_json())
    script("latency").main()
    table = LatencyTable.from_json(json.loads(Path("artifacts/tiny/latency.json").read_text()))
    assert len(table.layers) == len(cost.layer_macs(build(SPEC), SPEC.example())) and table.batch_size == 2
    assert table.layer_ms("layer1.0.conv1", 5, 7) > 0 and len(table.errors()) == 16
    assert "latency tiny: 10 layers and 16 whole networks at batch 2 on cpu_" in capsys.readouterr().out

"""DVC's own commands on the real stages, as its users type them, in a study of one cell."""

import hashlib
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

FINETUNE = "artifacts/micro/cells/l1-7"


@pytest.fixture()
def study(micro):
    """The committed study; whatever a test changes is put back."""
    yield micro
    micro.run("git checkout --quiet -- . && git clean --quiet -d --force reports && dvc checkout --quiet --force")


def test_repro_of_one_stage(study):
    assert "up to date" in study.run("dvc repro -s 'finetune@l1-7'")
    study.set_params(**{"finetune.weight_decay": 0.01})
    out = study.run("dvc repro -s 'finetune@l1-7'")
    assert "Running stage 'finetune@l1-7'" in out and "finetune l1-7: top-1" in out and "prune l1-7" not in out


def test_experiment_and_its_differences(study):
    out = study.run("dvc exp run -S study.budget.macs=0.8 --name wider")
    for stage in ("pretrain", "sensitivity"):
        assert f"Running stage '{stage}'" not in out
    for stage in ("allocate", "prune", "finetune", "benchmark"):
        assert f"Running stage '{stage}@l1-7'" in out
    assert "0.8" in study.run("dvc params diff") and "study.budget.macs" in study.run("dvc params diff")
    metrics = json.loads(study.run("dvc metrics diff --json"))
    assert list(metrics) == ["reports/micro/metrics.json"]
    assert metrics["reports/micro/metrics.json"]["l1.macs_ratio"]["new"] == pytest.approx(0.8, rel=0.01)
    study.run("dvc plots diff HEAD workspace")
    page = (study.path / "dvc_plots/index.html").read_text()
    assert page.count("vegaEmbed('#") == 2 and not re.search(r"<(?:script|link)[^>]*https?://", page)  # works offline
    assert '"rev": "HEAD"' in page and '"rev": "workspace"' in page
    assert "wider" in study.run("dvc exp show --csv")


@pytest.mark.slow
def test_queue_of_two_experiments(study):
    """Two workers in copies of their own; they take from Git and the cache what does not depend on the change."""
    study.run("dvc exp run --queue -S 'finetune.learning_rate=0.03,0.06'")
    study.run("dvc queue start -j 2")  # its workers hold the pipe: it returns when they are done
    state = study.run("dvc queue status")
    assert state.count("Success") == 2, state
    task = state.splitlines()[1].split()[0]
    out = study.run(f"dvc queue logs {task}")
    ran = {line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")}
    assert ran == {"finetune@l1-7", "benchmark@l1-7", "report"}, out
    rows = study.run("dvc exp show --csv --only-changed")
    assert "0.03" in rows and "0.06" in rows
    study.run("dvc queue remove --success")


def test_metrics_are_a_few_readable_rows(study):
    shown = json.loads(study.run("dvc metrics show --json"))
    files = [name for name, entry in shown[""]["data"].items()] if "" in shown else list(shown)
    assert files == ["reports/micro/metrics.json"]
    assert len(study.run("dvc metrics show").splitlines()) < 30


def digests(study) -> dict[str, str]:
    return {name: hashlib.sha256((study.path / FINETUNE / name).read_bytes()).hexdigest()
            for name in ("recovered.safetensors", "recovery.json")}


@pytest.fixture()
def long_training(study):
    """Enough epochs to be interrupted in the middle."""
    study.set_params(**{"finetune.epochs": 12})
    yield study
    for process in psutil.process_iter(["cmdline"]):
        if "pipeline/finetune.py" in (process.info["cmdline"] or []) and Path(process.cwd()) == study.path:
            process.kill()


def test_killed_training_ends_with_the_same_bytes(long_training):
    study = long_training
    study.run("python pipeline/finetune.py l1 7")
    undisturbed = digests(study)
    for name in undisturbed:
        (study.path / FINETUNE / name).unlink()
    first = study.start(["python", "pipeline/finetune.py", "l1", "7"])
    wait_for_an_epoch(study)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (study.path / FINETUNE / "recovered.safetensors").exists(), "it was too late to interrupt it"
    study.run("dvc repro -s 'finetune@l1-7'")
    assert digests(study) == undisturbed


def test_second_writer_is_blocked(long_training):
    study = long_training
    first = study.start(["python", "pipeline/finetune.py", "l1", "7"])
    wait_for_an_epoch(study)
    out = study.run("python pipeline/finetune.py l1 7", ok=False)
    assert out.startswith("error: ") and "Traceback" not in out
    assert first.wait(timeout=600) == 0


def wait_for_an_epoch(study) -> None:
    """Waits until the first epoch of a training run has been saved."""
    deadline = time.monotonic() + 300
    while not list(study.path.glob("artifacts/micro/resume/l1-7/*.safetensors")):
        assert time.monotonic() < deadline, "no resume checkpoint appeared"
        time.sleep(0.02)


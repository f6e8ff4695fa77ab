"""``make repro`` and ``make update``: what runs, what a failure leaves, who may write. Stubs stand for stages."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import yaml

import _graph
from clones import Clone

REST = {"prune@l1-2", "finetune@l1-2", "benchmark@l1-2"}
CELLS = {"l1-1", "l1-2", "hobs_rspar-1", "hobs_rspar-2"}


@pytest.fixture()
def clone(stubbed, tmp_path) -> Clone:
    """A copy of the finished stubbed study, cache and intermediate files included."""
    shutil.copytree(stubbed.path, tmp_path / "copy")
    return Clone(tmp_path / "copy")


@pytest.fixture()
def fresh(stubbed, tmp_path) -> Clone:
    """What a stranger gets: the commit, without cache and without intermediate files."""
    subprocess.run(["git", "clone", "--quiet", stubbed.path, tmp_path / "fresh"], check=True)
    return Clone(tmp_path / "fresh")


def test_nothing_to_do_is_said_without_loading_what_a_stage_needs(clone):
    """The commands that people wait for import neither PyTorch nor what draws figures."""
    before = clone.read("dvc.lock")
    for command in ("make repro JOBS=2", "make status"):
        out = clone.run(f"env PYTHONPROFILEIMPORTTIME=1 {command}")
        loaded = {line.rpartition("|")[2].strip() for line in out.splitlines() if line.startswith("import time:")}
        said = "\n".join(line for line in out.splitlines() if not line.startswith("import time:"))
        assert "everything is up to date" in said, said
        assert "yaml" in loaded
        assert not loaded & {"torch", "torchvision", "torch_pruning", "matplotlib", "onnx"}
    assert clone.read("dvc.lock") == before


def test_parallel_cells_run_each_and_lock_the_same(clone):
    """Without cache and results, so that all stages run; the other side is the plain ``dvc repro`` of the fixture."""
    serial = forget_everything(clone)
    out = clone.run("make repro JOBS=2")
    runs = len(CELLS) + len(yaml.safe_load(clone.read("params.yaml"))["study"]["claims"])
    assert all(f"finetune {cell}:" in out for cell in CELLS) and f"[{runs}/{runs}, about 0.0 min left]" in out
    assert yaml.safe_load(clone.read("dvc.lock")) == yaml.safe_load(serial)
    last = [line for line in out.splitlines() if re.match(r"\[\d+/\d+, ", line)][-2:]
    assert sorted(line.split()[-4] for line in last) == ["allocators:", "sensitivity:"], "what is timed runs alone"


def test_serial_run_writes_the_lock_as_dvc_does(clone):
    """Libyaml instead of DVC's own writer: the same bytes."""
    serial = forget_everything(clone)
    clone.run("make repro JOBS=1")
    assert clone.read("dvc.lock") == serial


def forget_everything(clone: Clone) -> str:
    """Back to before the first run; returns what dvc.lock was."""
    lock = clone.read("dvc.lock")
    (clone.path / "dvc.lock").unlink()
    for folder in ("artifacts", "data", "reports/stubbed", ".dvc/cache"):
        shutil.rmtree(clone.path / folder)
    return lock


def test_failed_cell_leaves_the_others_intact(clone):
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write("trap-prune-l1-2", "")
    out = clone.run("make repro JOBS=2", ok=False)
    assert "error: 1 of 4 cells failed" in out and "l1-2: prune l1-2 was told to fail" in out
    assert "Traceback" not in out
    assert {name for name in clone.stale() if "@" in name} == REST
    status = clone.run("make status")
    assert "1 failed" in status and "told to fail" in status
    (clone.path / "trap-prune-l1-2").unlink()
    assert "[1/1" in clone.run("make repro JOBS=2")
    assert clone.stale() == set()


def test_failed_cell_of_a_serial_run(clone):
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write("trap-prune-l1-2", "")
    out = clone.run("make repro JOBS=1", ok=False)
    assert "error: prune l1-2 was told to fail" in out and "1 of 4 cells failed" in out
    assert {name for name in clone.stale() if "@" in name} == REST


def test_edited_method_in_a_fresh_clone_reruns_its_cells_and_what_they_need(fresh):
    """The dense network is in the commit; data and sensitivity are not and have to run for the method's cells."""
    assert fresh.run("make update JOBS=2").count("everything is up to date") == 1
    before = fresh.locked()
    fresh.write("src/hobs_rspar/methods/l1.py", fresh.read("src/hobs_rspar/methods/l1.py") + "\n# edited\n")
    out = fresh.run("make update JOBS=2")
    changed = {stage for stage, entry in fresh.locked().items() if entry != before[stage]}
    assert changed == {f"{stage}@l1-{seed}" for stage in ("allocate", "prune", "finetune", "benchmark")
                       for seed in (1, 2)} | {"report"}
    assert "hobs_rspar" not in out and "data :" in out


def test_second_writer_is_told_who_works(clone):
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write("trap-prune-l1-1", "20")
    with caught_in(clone, "prune.py"):
        out = clone.run("make repro JOBS=2", ok=False)
        assert "error: 'make repro' (process" in out and "already working" in out
        assert "already working" in clone.run("make study STUDY=toy", ok=False)
        assert "running: 'make repro'" in clone.run("make status")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_process_and_goes_on(clone, how):
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write("trap-prune-l1-1", "600")
    with caught_in(clone, "prune.py") as first:
        workers = psutil.Process(first.pid).children(recursive=True)
        if how == signal.SIGINT:
            os.killpg(first.pid, how)  # as a terminal does
        else:
            runner(workers).terminate()
        out = first.communicate(timeout=120)[0]
    assert "stopped; what is finished is kept" in out and "Traceback" not in out
    assert not psutil.wait_procs(workers, timeout=60)[1]
    (clone.path / "trap-prune-l1-1").unlink()
    if how == signal.SIGINT:
        clone.run("make repro JOBS=2")
        assert clone.stale() == set()


def test_a_killed_run_leaves_nothing_in_the_way_of_the_next(clone):
    """Killed without a chance to end its workers: they are still at work when the same command comes again."""
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write("trap-prune-l1-1", "600")
    with caught_in(clone, "prune.py") as first:
        log = clone.path / ".study/logs/l1-1.log"
        wait_for(lambda: log.exists() and "prune l1-1: trapped" in log.read_text())
        workers = psutil.Process(first.pid).children(recursive=True)
        runner(workers).kill()
        (clone.path / "trap-prune-l1-1").unlink()
        clone.run("make repro JOBS=2")
    assert clone.stale() == set() and not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.parametrize("jobs", [1, 2])
def test_stage_that_runs_alone_ends_with_the_run(clone, jobs):
    """Stopped from outside, and not by a terminal, which would reach the stage itself."""
    clone.set_params(**{"sensitivity.damping": 0.5})
    clone.write("trap-sensitivity-", "600")
    with caught_in(clone, "sensitivity.py", jobs) as first:
        workers = psutil.Process(first.pid).children(recursive=True)
        runner(workers).terminate()
        first.communicate(timeout=120)
    assert not psutil.wait_procs(workers, timeout=60)[1]


def test_list_of_files_in_use_left_empty_by_a_killed_run(clone):
    """DVC writes it in place: stopped in the middle, it is empty, and DVC refuses every stage."""
    clone.set_params(**{"prune.ridge": 0.5})
    clone.write(".dvc/tmp/rwlock", "")
    assert "JSON structure is corrupted" in clone.run("dvc repro --single-item prune@l1-1", ok=False)
    clone.run("make repro JOBS=2")
    assert clone.stale() == set()


def entries(**commands: tuple[int, str]) -> dict:
    """What DVC writes while it runs stages: for each, a file that it writes and one that it reads."""
    infos = {name: {"pid": pid, "cmd": cmd} for name, (pid, cmd) in commands.items()}
    written = {f"/study/{name}": info for name, info in infos.items()}
    return {"write": written, "read": {"/study/shared": [*infos.values()]}}


def test_entries_of_other_commands_leave_the_list_of_files_in_use(tmp_path, monkeypatch):
    """Of a dead process, of a living one with another command line (its number was given anew), and of living ones."""
    monkeypatch.chdir(tmp_path)
    used = tmp_path / ".dvc/tmp/rwlock"
    used.parent.mkdir(parents=True)
    (tmp_path / "dvc.py").write_text("import time\n\ntime.sleep(600)\n")
    script = subprocess.Popen([sys.executable, "-X", "dev", "dvc.py", "repro", "a stage"])
    module = subprocess.Popen([sys.executable, "-m", "dvc", "repro"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    try:
        wait_for(lambda: all("dvc" in " ".join(psutil.Process(one.pid).cmdline()) for one in (script, module)))
        alive = {"script": (script.pid, "dvc.py repro a stage"), "module": (module.pid, f"{tmp_path}/dvc.py repro")}
        gone = {"dead": (dead.pid, "dvc.py repro"), "first": (1, "/bin/dvc repro"), "own": (os.getpid(), "dvc repro"),
                "number": (script.pid, "dvc.py repro other"), "argument": (module.pid, f"{tmp_path}/dvc.py status"),
                "file": (module.pid, f"{tmp_path}/tasks/_dvc.py.old repro")}
        used.write_text(json.dumps(entries(**gone, **alive)))
        _graph.mend_rwlock()
        assert json.loads(used.read_text()) == entries(**alive)
    finally:
        for process in (script, module):
            process.kill()
            process.wait()
    _graph.mend_rwlock()
    assert json.loads(used.read_text()) == {"write": {}, "read": {}}
    for broken in ("", "[]", '{"write": {"a": {}}}'):
        used.write_text(broken)
        _graph.mend_rwlock()
        assert not used.exists()


def test_a_stopped_run_whose_number_another_program_has(clone):
    """The number of a process that is alive, and is no DVC: DVC alone would refuse the stage."""
    clone.set_params(**{"prune.ridge": 0.5})
    path = str(clone.path / "artifacts/stubbed/cells/l1-1/pruned.safetensors")
    clone.write(".dvc/tmp/rwlock", json.dumps({"write": {path: {"pid": os.getpid(), "cmd": "tasks/_dvc.py repro"}}}))
    assert "you can manually remove" in clone.run("dvc repro --single-item prune@l1-1", ok=False)
    clone.run("make repro JOBS=2")
    assert clone.stale() == set()


def test_bad_params_stop_before_anything_runs(clone):
    clone.set_params(**{"methods.hobs_rspar.iterations": -3, "sensitivity.damping": 0.5})
    out = clone.run("make repro", ok=False)
    assert "error: params.yaml: methods.hobs_rspar.iterations" in out and "stub" not in out
    assert "at least one cell" in clone.run("make repro JOBS=0", ok=False)


@contextmanager
def caught_in(clone: Clone, script: str, jobs: int = 2) -> Iterator[subprocess.Popen]:
    """A run of the study that has come to a stage; ended at the end."""
    process = clone.start(["make", "repro", f"JOBS={jobs}"])
    try:
        wait_for(lambda: stage_of(process, script))
        yield process
    finally:
        stop(process)


def runner(workers: list[psutil.Process]) -> psutil.Process:
    """The process among them that starts all others."""
    return next(worker for worker in workers if "tasks/repro.py" in worker.cmdline())


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def stage_of(process: subprocess.Popen, script: str) -> bool:
    return any(script in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children(recursive=True)
               if child.is_running() and child.status() != psutil.STATUS_ZOMBIE)


def stop(process: subprocess.Popen) -> None:
    """Ends a process group that a test started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()

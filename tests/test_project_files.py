"""What surrounds the code: pins, Docker, licence, citation, configurations, Makefile; nothing private in it."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ruamel.yaml import YAML

import study as study_task
from _dvc import as_dvc_writes
from clones import ROOT
from hobs_rspar.errors import UserError

OVERLAYS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
REQUIREMENTS = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
REQUIREMENTS = [line for line in REQUIREMENTS if line]
REQUIRED = {"torch", "torchvision", "dvc", "torch-pruning", "pyyaml", "nvidia-ml-py", "pandas", "seaborn", "pytest"}


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_pin_is_exact(line):
    assert re.fullmatch(r'[a-z.\-0-9]+==[0-9][0-9a-z.]*( ; python_version (>=|<) "3\.\d+")?', line)


def test_pins_are_what_runs_here():
    for line in REQUIREMENTS:
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate():
            assert pin.specifier.contains(version(pin.name).split("+")[0]), pin.name


def test_every_package_has_its_reason():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert REQUIRED <= {line.split("==")[0] for line in lines}
    explained = {line.split("==")[0] for line in lines if re.search(r"# .{10}", line)}
    assert {line.split("==")[0] for line in lines} == explained


def test_versions_for_the_oldest_python_are_there():
    """A package whose pin needs a newer Python has a second line for the older one."""
    newer = {line.split("==")[0] for line in REQUIREMENTS if '>= "3.11"' in line}
    older = {line.split("==")[0] for line in REQUIREMENTS if '< "3.11"' in line}
    assert newer == older and 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_dockerfile():
    """Parsed only: nothing here can build an image with a GPU."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert {word for word, _ in steps} <= {"FROM", "RUN", "COPY", "WORKDIR", "CMD"}
    base = next(rest for word, rest in steps if word == "FROM")
    cuda = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-runtime-ubuntu24\.04", base)
    assert cuda, base
    assert cuda.groups() == ("13", "0"), "the CUDA version that PyPI's wheel of the pinned torch is built for"
    assert "torch==2.13.0" in REQUIREMENTS, "a new torch: look up its CUDA version, then change both"
    copied = [rest for word, rest in steps if word == "COPY"]
    assert any("requirements.txt" in files for files in copied)
    installs = [rest for word, rest in steps if word == "RUN" and ("pip" in rest or "make setup" in rest)]
    assert installs == ["make setup"], "packages come from requirements.txt alone"
    for files in copied:
        assert all((ROOT / name).exists() for name in files.split()[:-1])


def test_licence_and_citation():
    assert "MIT License" in (ROOT / "LICENSE").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["license"] == "MIT"
    assert citation["preferred-citation"]["title"].startswith("H-OBS/R-SPAR")
    assert f'version = "{citation["version"]}"' in (ROOT / "pyproject.toml").read_text()


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci/run"
    assert {"make lint", "make test"} <= set(script.read_text().splitlines())
    assert script.stat().st_mode & 0o100


@pytest.mark.parametrize("target", ["setup", "repro", "update", "test", "study", "preview", "status", "report", "lint",
                                    "help"])
def test_make_target_exists_and_is_explained(target):
    assert re.search(rf"^{target}:.*## .{{8}}", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_committed_params_are_the_default_study():
    committed = subprocess.run(["git", "show", "HEAD:params.yaml"], cwd=ROOT, capture_output=True, text=True)
    if committed.returncode:
        pytest.skip("no commit to look at")
    assert committed.stdout == (ROOT / "configs/default.yaml").read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_is_valid(name, monkeypatch, tmp_path):
    """Merged with the default, every configuration passes all checks, those of its methods' options too."""
    monkeypatch.chdir(ROOT)
    overlay = study_task.studied([name])
    text = study_task.composed(overlay)
    monkeypatch.setattr(study_task, "FOLDER", tmp_path)
    study_task.validate(overlay, text)
    params, default = yaml.safe_load(text), yaml.safe_load((ROOT / "configs/default.yaml").read_text())
    assert params["study"]["name"] == name
    assert name == "default" or list(study_task.differences(params, default)) != ["study.name"], "it changes nothing"


def test_an_overlay_comes_after_the_one_that_it_extends(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    base, extended = (yaml.safe_load(study_task.composed(study_task.studied([name]))) for name in
                      ("pareto", "pareto_50"))
    assert set(study_task.differences(base, extended)) == {"study.name", "study.budget.macs"}
    monkeypatch.setattr(study_task, "CONFIGS", tmp_path)
    for name, other in (("a", "b"), ("b", "a"), ("c", "gone"), ("default", None)):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}\nstudy: {{}}\n")
    with pytest.raises(UserError, match="extends itself"):
        study_task.composed(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="no study 'gone'"):
        study_task.composed(tmp_path / "c.yaml")


def test_an_overlay_may_lie_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study_task, "STARTED_IN", tmp_path)
    mine = tmp_path / "mine.yaml"
    with pytest.raises(UserError, match="mine.yaml not found; STUDY=path/to/mine.yaml names a file"):
        study_task.studied(["mine.yaml"])
    mine.write_text("# What for.\nextends: pareto\nstudy:\n  budget:\n    macs: 0.4\n")
    assert study_task.studied(["mine.yaml"]) == study_task.studied([str(mine)]) == mine
    text = study_task.composed(mine)
    assert text.startswith(f"# What for.\n# Written by 'make study STUDY={mine}' from configs/default.yaml and {mine}.")
    base, own = yaml.safe_load(study_task.composed(study_task.studied(["pareto"]))), yaml.safe_load(text)
    assert study_task.differences(base, own) == {"study.name": ("pareto", "mine"), "study.budget.macs": (
        base["study"]["budget"]["macs"], 0.4)}
    monkeypatch.setattr(study_task, "FOLDER", tmp_path / "new")
    mine.write_text("study:\n  budgt: {}\n")
    with pytest.raises(UserError, match=f"{mine}.*budgt"):
        study_task.validate(mine, study_task.composed(mine))
    (tmp_path / "toy.yaml").write_text("study: {}\n")
    with pytest.raises(UserError, match="would be the study 'toy', which configs/toy.yaml is already"):
        study_task.studied(["toy.yaml"])
    assert study_task.studied([str(ROOT / "configs/toy.yaml")]) == Path("configs/toy.yaml")


def test_edits_of_a_study_from_anywhere_are_told_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    mine = tmp_path / "mine.yaml"
    mine.write_text("study:\n  budget:\n    macs: 0.4\n")
    monkeypatch.setattr(study_task, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(study_task, "FOLDER", tmp_path)
    (tmp_path / "params.yaml").write_text(study_task.composed(mine))
    study_task.keep_edits("mine")
    assert capsys.readouterr().out == ""
    (tmp_path / "params.yaml").write_text(study_task.composed(mine).replace("macs: 0.4", "macs: 0.3"))
    study_task.keep_edits("mine")
    assert "params.yaml had your edits (study.budget.macs)" in capsys.readouterr().out
    assert "macs: 0.3" in (tmp_path / "params-mine.yaml").read_text()


@pytest.mark.parametrize("name", OVERLAYS)
def test_block_style(name):
    """DVC's -S would rewrite flow lists, and then a diff shows more than the change."""
    for line in (ROOT / f"configs/{name}.yaml").read_text().splitlines():
        assert not re.search(r": [\[{].", line.replace("[]", "").replace("{}", "")), line


def test_switching_studies_keeps_what_is_known_of_the_files_that_are_here(monkeypatch, tmp_path):
    """Shared stages keep their present entries; another network's, and those of cells, come back with their study."""
    monkeypatch.chdir(tmp_path)
    lock, committed = Path("dvc.lock"), YAML(typ="safe").load((ROOT / "dvc.lock").read_text())
    names = ["data", "pretrain", "sensitivity", "latency", "allocate@l1-42"]
    text = as_dvc_writes({**committed, "stages": {name: committed["stages"][name] for name in names}})
    lock.write_text(text)
    study_task.swap_lock("default", "recovery")  # the first time: what studies share stays
    assert set(yaml.safe_load(lock.read_text())["stages"]) == {"data", "pretrain", "sensitivity"}
    study_task.swap_lock("recovery", "default")
    assert lock.read_text() == text and Path("reports/recovery/dvc.lock").exists()
    trained = yaml.safe_load(text)
    trained["stages"]["pretrain"]["outs"][0]["md5"] = "new"
    lock.write_text(yaml.safe_dump(trained))
    study_task.swap_lock("default", "recovery")  # the dense network was trained again in the meantime
    assert yaml.safe_load(lock.read_text())["stages"]["pretrain"] == trained["stages"]["pretrain"]
    Path("reports/other").mkdir()
    Path("reports/other/dvc.lock").write_text(text.replace("resnet20", "resnet56"))
    study_task.swap_lock("recovery", "other")
    assert "resnet56" in yaml.safe_load(lock.read_text())["stages"]["pretrain"]["outs"][0]["path"]


def test_tracked_files_name_no_path_of_a_machine():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                            check=True).stdout.decode().split("\0")
    private = re.compile(rb"(?<![\w.:/$}])/(root|home|work|tmp|Users|opt)/\w")
    for name in filter(None, listed):
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png", ".safetensors"):
            found = private.search(path.read_bytes())
            assert not found, f"{name}: {found and path.read_bytes()[max(0, found.start() - 40):found.end() + 40]}"


# make setup

def test_setup_works_offline_and_does_nothing_the_second_time(micro):
    stamp = Path(sys.prefix) / ".installed"
    assert "is ready" in micro.run("env PIP_NO_INDEX=1 make setup")
    before = stamp.stat().st_mtime_ns
    out = micro.run("make setup")
    assert "is ready" in out and "installing" not in out and stamp.stat().st_mtime_ns == before


def test_setup_says_what_an_old_python_needs(monkeypatch):
    import setup
    monkeypatch.setattr(setup.sys, "version_info", (3, 8, 1))
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: Python 3\.8 is too old.*make setup PYTHON="):
        setup.main()


def test_setup_takes_a_newer_python_on_the_path(monkeypatch):
    import setup
    started = []
    monkeypatch.setattr(setup.sys, "version_info", (3, 8, 1))
    monkeypatch.setattr(setup.shutil, "which", lambda name: name if name in ("python3.12", "python3.10") else None)
    monkeypatch.setattr(setup.subprocess, "call", lambda *_, **__: 0)
    monkeypatch.setattr(setup.os, "execvp", lambda name, _: started.append(name) or sys.exit())
    with pytest.raises(SystemExit):
        setup.main()
    assert started == ["python3.12"]


def test_setup_says_what_is_missing_without_ensurepip(monkeypatch, tmp_path):
    import setup
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="apt install python3-venv"):
        setup.create(tmp_path / "venv")


def test_setup_without_ensurepip_uses_the_systems_pip(monkeypatch, tmp_path):
    import setup
    commands = []
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: name == "pip" or None)
    monkeypatch.setattr(setup.subprocess, "call", lambda command, **_: commands.append(command) or 0)
    setup.create(tmp_path / "venv")
    assert "--without-pip" in commands[0] and "--python" in commands[1]

"""A study without DVC: the same stages, the same bytes, nothing twice."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from clones import ROOT, chdir

sys.path.append(str(ROOT / "tasks"))  # as Python does for the script's own folder

import without_dvc  # noqa: E402

SAME = ("artifacts/micro/cells/l1-7/plan.json", "artifacts/micro/cells/l1-7/pruned.safetensors",
        "artifacts/micro/cells/l1-7/recovered.safetensors", "artifacts/dense/fashion_mnist_resnet8/dense.safetensors",
        "artifacts/dense/fashion_mnist_resnet8/gates.safetensors")


def expanded(folder: Path) -> list[without_dvc.Stage]:
    defined, values = (yaml.safe_load((folder / name).read_text()) for name in ("dvc.yaml", "params.yaml"))
    return list(without_dvc.stages(defined["stages"], values))


def test_the_stages_are_those_of_dvc():
    from dvc.repo import Repo

    ours = {stage.name: stage for stage in expanded(ROOT)}
    with chdir(ROOT), Repo() as repo:
        theirs = {stage.addressing: stage for stage in repo.index.stages}
        assert ours.keys() == theirs.keys()
        for name, stage in theirs.items():
            files = {str(dep) for dep in stage.deps if type(dep).__name__ == "Dependency"}
            keys = {key for dep in stage.deps if hasattr(dep, "params") for key in dep.params}
            assert (ours[name].cmd, set(ours[name].deps), set(ours[name].params)) == (stage.cmd, files, keys), name
            assert set(ours[name].outs) == set(map(str, stage.outs)), name


def test_every_stage_comes_after_what_it_reads():
    made: set[str] = set()
    every = {out for stage in expanded(ROOT) for out in stage.outs}
    for stage in expanded(ROOT):
        assert {name for name in stage.deps if name in every} <= made, stage.name
        made |= set(stage.outs)


@pytest.fixture()
def bare(micro, tmp_path):
    """The committed study without anything that its stages made but the data."""
    shutil.copytree(micro.path, tmp_path / "bare", ignore=shutil.ignore_patterns(".git", ".dvc"), symlinks=True)
    copy = type(micro)(tmp_path / "bare")
    for name in ("artifacts", "reports/micro", ".study"):
        shutil.rmtree(copy.path / name, ignore_errors=True)
    return copy


def test_it_makes_the_same_bytes_goes_on_and_does_nothing_twice(micro, bare):
    assert "0.001 minutes are over" in bare.run("python tasks/without_dvc.py --minutes 0.001", ok=False)
    out = bare.run("python tasks/without_dvc.py")
    assert "finetune l1-7: top-1" in out and "report micro: 1 of 1 cells" in out
    for name in SAME:
        assert (bare.path / name).read_bytes() == (micro.path / name).read_bytes(), name
    assert bare.run("python tasks/without_dvc.py") == ""
    bare.set_params(**{"finetune.weight_decay": 0.01})
    again = bare.run("python tasks/without_dvc.py")
    assert "prune l1-7:" not in again and "finetune l1-7: top-1" in again and "report micro" in again
    assert "no stage of dvc.yaml begins so" in bare.run("python tasks/without_dvc.py --only nothing", ok=False)


def test_what_follows_a_failed_or_a_killed_stage_is_not_taken_for_done(tmp_path, monkeypatch, capfd):
    """Two stages; the second reads what the first writes, which is still there from an earlier time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(without_dvc, "STAMPS", tmp_path / "stamps")
    Path("copy.py").write_text("import pathlib, sys; text = pathlib.Path(sys.argv[1]).read_text()\n"
                               "sys.exit(text) if 'bad' in text else pathlib.Path(sys.argv[2]).write_text(text)")
    first = without_dvc.Stage("first", "python copy.py in.txt middle.txt", ("in.txt",), ("a",), ("middle.txt",))
    second = without_dvc.Stage("second", "python copy.py middle.txt out.txt", ("middle.txt",), (), ("out.txt",))

    def reproduce(text: str) -> list[str]:
        Path("in.txt").write_text(text)
        return without_dvc.reproduce([first, second], {"a": 1}, 60.0)

    assert reproduce("good") == [] and Path("out.txt").read_text() == "good"
    assert reproduce("bad") == ["first", "second"]
    assert "second: left out, middle.txt is missing or of an earlier time" in capfd.readouterr().err
    assert reproduce("good") == []  # and the first one ran again, because it had not ended
    assert "first" in capfd.readouterr().out

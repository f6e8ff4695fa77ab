"""Two revisions of a study, paired by seed: numbers against scipy, names of Git and of DVC, and refusals."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from scipy import stats

from clones import ROOT
from synthetic_cells import PLATFORM, SEEDS, edit, make_study

sys.path.append(str(ROOT / "tasks"))

import compare  # noqa: E402
from hobs_rspar.errors import UserError  # noqa: E402


def git(*arguments: str) -> str:
    return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True,
                          capture_output=True, text=True).stdout.strip()


@pytest.fixture()
def study(tmp_path, monkeypatch):
    """A commit with one study, and a workspace in which l1 gained a point or so and the budget was changed."""
    monkeypatch.chdir(make_study(tmp_path, methods=("unpruned", "l1", "hobs_rspar")))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    for place, seed in enumerate(SEEDS):
        edit(tmp_path / f"reports/default/cells/l1-{seed}.json", lambda cell, place=place: cell["accuracy"].update(
            test=cell["accuracy"]["test"] + 1 + 0.1 * place))
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    params["study"]["budget"]["macs"], params["study"]["methods"] = 0.3, ["hobs_rspar", "l1"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    return tmp_path


def run(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *names])
    compare.main()


def test_methods_of_both_are_paired_by_seed(study, monkeypatch, capsys):
    run(monkeypatch, "HEAD", "workspace")
    out = capsys.readouterr().out
    assert "study.budget.macs: 0.26 -> 0.3" in out and "| l1 | 5 |" in out and "unpruned |" not in out
    written = (study / "comparisons/HEAD_workspace/comparison.csv").read_text()
    table = {row["method"]: row for row in csv.DictReader(written.splitlines())}
    assert list(table) == ["l1", "hobs_rspar"]
    gains = 1 + 0.1 * np.arange(len(SEEDS))
    interval = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    row = table["l1"]
    assert [float(row[f"top1_{key}"]) for key in ("difference", "lo", "hi")] == pytest.approx(
        [gains.mean(), *interval], abs=1e-3)
    p_value = stats.ttest_1samp(gains, 0).pvalue
    assert float(row["p_adjusted"]) == pytest.approx(2 * p_value, rel=1e-2)  # Holm over two methods
    assert float(table["hobs_rspar"]["top1_difference"]) == float(row["before_difference"]) == 0
    ratios = [json.loads((study / f"reports/default/platforms/{PLATFORM}/l1-{seed}.json").read_text())["batches"]["64"]
              ["speedup"] for seed in SEEDS]
    assert float(row["speedup_a"]) == float(row["speedup_b"]) == pytest.approx(np.median(ratios), abs=1e-3)


def test_an_experiment_goes_by_its_name(study, monkeypatch, capsys):
    """DVC keeps experiments as references below refs/exps."""
    git("add", ".")
    git("commit", "--quiet", "--message", "second")
    git("update-ref", "refs/exps/ab/cdef/fizzy-bard", "HEAD")
    git("reset", "--quiet", "--hard", "HEAD~1")
    run(monkeypatch, "HEAD", "fizzy-bard")
    assert "study.budget.macs: 0.26 -> 0.3" in capsys.readouterr().out
    run(monkeypatch, "HEAD", "workspace")
    assert "params.yaml is the same in both" in capsys.readouterr().out


@pytest.mark.parametrize(("names", "message"), [
    (("HEAD",), "say what to compare: make compare A="),
    (("HEAD", "HAED"), "'HAED' is neither a Git revision nor a DVC experiment"),
    (("empty", "workspace"), "share no method with at least two seeds"),
    (("bare", "workspace"), "bare has no params.yaml"),
])
def test_refusals(study, monkeypatch, names, message):
    git("stash", "--quiet")
    git("checkout", "--quiet", "-b", "empty")
    git("rm", "-r", "--quiet", "reports/default/cells")
    git("commit", "--quiet", "--message", "no cells")
    git("checkout", "--quiet", "-b", "bare")
    git("rm", "--quiet", "params.yaml")
    git("commit", "--quiet", "--message", "no params")
    git("checkout", "--quiet", "-")
    git("checkout", "--quiet", "HEAD~1")
    git("stash", "pop", "--quiet")
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        run(monkeypatch, *names)

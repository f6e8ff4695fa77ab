"""Equal tuning: every method with constants has its ranges, and a trial is what the study would give, less the test."""

import json
import runpy
import sys

import pytest
import yaml

import small_study
from clones import ROOT
from hobs_rspar import config
from hobs_rspar.methods import _registry

SCRIPT = ROOT / "benchmarks" / "tuning.py"
ASKED = yaml.safe_load((ROOT / "benchmarks" / "tuning.yaml").read_text())
BLOCK = {"images": 64, "batch_size": 32, "learning_rate": 0.01, "strength": 0.02}


def tune(monkeypatch, *arguments: str) -> str:
    """Runs the script in this process; its error message, or an empty string."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as end:
        assert isinstance(end.code, str)
        return end.code
    return ""


@pytest.fixture()
def study(tmp_path, monkeypatch):
    folder = small_study.make(tmp_path, monkeypatch)
    blocks = small_study.PARAMS["methods"] | {"depgraph": BLOCK}
    text = yaml.safe_load((folder / "params.yaml").read_text()) | {"methods": blocks}
    (folder / "params.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    (folder / "data/fashion_mnist/test.safetensors").unlink()  # nobody may look at it
    return folder


def trials(folder) -> list[dict]:
    return json.loads((folder / "reports/small/tuning/depgraph.json").read_text())["trials"]


def test_ranges_are_of_constants_that_exist_and_hold_the_present_values():
    params = config.load(ROOT / "configs/default.yaml")
    blocks = params.methods
    assert not set(ASKED["seeds"]) & set(params.study.seeds) and ASKED["trials"] > 1
    for method, ranges in ASKED["methods"].items():
        for name, (low, high) in ranges.items():
            assert low <= blocks[method][name] <= high, (method, name)
        for end in (0, 1):
            _registry.options(method, blocks[method] | {name: ends[end] for name, ends in ranges.items()})


def test_trials_are_as_many_as_for_all_and_the_first_is_the_present(study, monkeypatch, capsys):
    assert tune(monkeypatch, "depgraph") == ""
    found = trials(study)
    assert len(found) == ASKED["trials"] == len({json.dumps(trial["constants"]) for trial in found})
    assert found[0]["constants"] == {"strength": 0.02, "learning_rate": 0.01}
    for trial in found:
        assert len(trial["top1_validation"]) == len(ASKED["seeds"])
        assert all(low <= trial["constants"][name] <= high
                   for name, (low, high) in ASKED["methods"]["depgraph"].items())
    assert capsys.readouterr().out.count("%") >= ASKED["trials"]
    kept = (study / "reports/small/tuning/depgraph.json").read_bytes()
    assert tune(monkeypatch, "depgraph") == ""  # nothing is run twice
    assert (study / "reports/small/tuning/depgraph.json").read_bytes() == kept


def test_a_trial_is_the_cell_of_the_stages(study, monkeypatch):
    """Same validation accuracy as allocate, prune and finetune give for the same seed."""
    small_study.set_params(study, study__methods=["depgraph"], study__seeds=[7])
    monkeypatch.setattr(yaml, "safe_load", shortened(yaml.safe_load))
    assert tune(monkeypatch, "depgraph") == ""
    monkeypatch.undo()
    monkeypatch.chdir(study)
    data = study / "data/fashion_mnist"
    (data / "test.safetensors").write_bytes((data / "validation.safetensors").read_bytes())
    monkeypatch.syspath_prepend(str(ROOT / "pipeline"))
    for name in ("allocate", "prune", "finetune"):
        assert small_study.stage(name, monkeypatch, "depgraph", "0") == ""
    cell = json.loads((study / "artifacts/small/cells/depgraph-0/recovery.json").read_text())
    assert trials(study)[0]["top1_validation"] == [cell["top1_validation"]]


def shortened(load):
    """One trial and one seed; other files are read as they are."""
    def read(text):
        found = load(text)
        return found | {"trials": 1, "seeds": [0]} if isinstance(found, dict) and "trials" in found else found
    return read


def test_the_studys_own_seeds_are_refused(study, monkeypatch):
    small_study.set_params(study, study__seeds=[7, 1])
    assert "tuning.yaml: seeds: [1] are the study's own" in tune(monkeypatch, "depgraph")


@pytest.mark.parametrize(("arguments", "hint"), [((), "usage: python benchmarks/tuning.py METHOD. Methods"),
                                                 (("depgrph",), "Did you mean 'depgraph'"), (("l1",), "Methods with")])
def test_a_method_without_ranges_is_one_message(study, monkeypatch, arguments, hint):
    assert hint in tune(monkeypatch, *arguments)

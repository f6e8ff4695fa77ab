"""The toy study: the whole path from nothing to the report, twice, and in parallel as in series."""

import json

import yaml

TIMED = ("latency", "benchmark", "speed", "export", "report")  # their outputs contain measurements


def test_runs_from_nothing_to_the_report(toy):
    out = toy.read("printed/repro")
    params = yaml.safe_load(toy.read("params.yaml"))["study"]
    cells = [f"{method}-{seed}" for method in params["methods"] for seed in params["seeds"]]
    assert f"[{len(cells)}/{len(cells)}," in out and "reports/toy/index.html  reports/toy/tables/T1.md" in out
    for cell in cells:
        assert f"finetune {cell}: " in out and f"benchmark {cell}: " in out
        assert (toy.path / f"reports/toy/cells/{cell}.json").is_file()
    for name in ("index.html", "metrics.json", "tables/T1.csv", "tables/claims.csv"):
        assert (toy.path / "reports/toy" / name).stat().st_size > 0
    assert "Traceback" not in out and "Warning" not in out


def test_second_run_does_nothing(toy):
    before = toy.read("dvc.lock")
    out = toy.run("make repro JOBS=2")
    assert "everything is up to date" in out and toy.read("dvc.lock") == before
    assert "up to date" in toy.run("dvc repro").splitlines()[-1]


def test_budget_is_met_by_every_plan(toy):
    for path in (toy.path / "reports/toy/cells").glob("*.json"):
        cell = json.loads(path.read_text())
        wanted = 1 if cell["method"] == "unpruned" else cell["budget"]["macs"]
        assert abs(cell["plan"]["macs_ratio"] - wanted) <= 0.01 * wanted, path.name


def test_serial_run_has_the_same_hashes(toy, new_clone):
    """Computed anew in another checkout, without cache: one seed of the two methods, one process after the other."""
    clone = new_clone("serial")
    clone.run("make study STUDY=toy")
    clone.set_params(**{"study.methods": ["l1", "hobs_rspar"], "study.seeds": [42], "benchmark.seconds": 0.1,
                        "speed.cells": [], "export.cells": [], "study.claims": []})
    out = clone.run("make repro JOBS=1")
    assert "finetune hobs_rspar-42" in out
    compared = [stage for stage in clone.locked() if stage.partition("@")[0] not in TIMED]
    assert {stage.partition("@")[0] for stage in compared} == {"data", "pretrain", "sensitivity", "allocate", "prune",
                                                             "finetune"}
    for stage in compared:
        assert clone.outputs(stage) == toy.outputs(stage), stage


def test_the_report_alone_is_drawn_from_the_records(toy):
    names, kept = ("index.html", "figures/accuracy_macs.svg", "tables/T1.md"), toy.read("params.yaml")
    before = [toy.read(f"reports/toy/{name}") for name in names]
    (toy.path / "reports/toy/index.html").unlink()
    assert "6 of 6 cells" in toy.run("make report STUDY=toy")
    assert [toy.read(f"reports/toy/{name}") for name in names] == before and toy.read("params.yaml") == kept
    assert "Did you mean 'toy'" in toy.run("make report STUDY=tyo", ok=False)
    assert "say which study: make report STUDY=pareto" in toy.run("make report", ok=False)


def test_status_of_a_finished_study(toy):
    assert "6 done" in toy.run("make status")


def test_switching_studies_keeps_each_lock(toy):
    """Away and back: no stage of the toy study becomes stale."""
    lock, params = toy.read("dvc.lock"), toy.read("params.yaml")
    toy.run("make study STUDY=default")
    assert toy.read("params.yaml") == toy.read("configs/default.yaml")
    toy.run("make study STUDY=toy")
    assert toy.read("dvc.lock") == lock and toy.read("params.yaml") == params
    assert toy.stale() == set()
    toy.run("git checkout --quiet -- . && git clean --quiet --force reports")

"""The experiments, as scripts, and those of C3 and C8 in miniature: records and verdicts follow from their numbers."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from clones import ROOT
from hobs_rspar import config
from hobs_rspar.allocation.space import Space
from hobs_rspar.allocation.trial import Result
from hobs_rspar.evidence.claim_files import write
from small import zoo_groups

sys.path.append(str(ROOT / "benchmarks"))  # as Python does for the script's own folder

import _allocation  # noqa: E402
import allocators  # noqa: E402
import penalty  # noqa: E402

KEYS = {"claim", "measured", "lo", "hi", "unit", "holds", "reason", "conditions", "seconds", "tables"}


@pytest.fixture()
def published(monkeypatch):
    """A problem with random statistics instead of the study's; collects what is published."""
    groups, random, records = zoo_groups("resnet20"), np.random.default_rng(0), []
    sizes = groups.sizes.tolist()
    rows = torch.from_numpy(random.normal(0, 1, (16, sum(sizes))).astype(np.float32))
    relative = [np.linspace(0, 1, size + 1)[1:] ** random.uniform(1, 4) for size in sizes]
    scores = [torch.from_numpy(curve) for curve in relative]
    problem = _allocation.Problem(config.load(ROOT / "configs/default.yaml"), {"top1_validation": 93.0, "classes": 10},
                                  Space(groups, 0.26, 0.1), scores, relative, {"true_rows": rows, "sampled_rows": rows})
    monkeypatch.setattr(_allocation, "publish", lambda params, record: records.append(record))
    for module in (allocators, penalty):
        monkeypatch.setattr(module, "load", lambda: problem)
    return records


def check(record: dict, claim: str, path) -> None:
    """All that the report needs is there, and nothing that it would refuse."""
    write(path / f"{claim}.json", record)
    assert record.keys() == KEYS and record["claim"] == claim and record["reason"] == ""
    assert record["lo"] <= record["measured"] <= record["hi"] and isinstance(record["holds"], bool)
    for table in record["tables"]:
        assert table.keys() == {"name", "title", "note", "columns", "rows"} and table["rows"]
        for row in table["rows"]:
            assert {key for key, _ in table["columns"]} <= row.keys()


@pytest.mark.parametrize("experiment", config.EXPERIMENTS)
def test_an_experiment_starts_from_nothing_but_its_script(experiment, tmp_path):
    """In a process of its own, without this checkout on the path: it finds its modules, and misses the study."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / f"{experiment}.py"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: params.yaml"), done.stderr


def test_allocators_in_miniature(published, monkeypatch, tmp_path):
    monkeypatch.setattr(allocators, "SEEDS", range(2))
    monkeypatch.setattr(allocators, "LIMITS", {"40 evaluations": (40, np.inf), "0.02 s": (10**9, 0.02)})
    monkeypatch.setattr(allocators, "ALLOCATIONS", 50)
    allocators.main()
    check(published[0], "C8", tmp_path / "new")
    compared, ratios, speeds = published[0]["tables"]
    assert len(compared["rows"]) == 2 * 2 * 10 and len(ratios["rows"]) == 2 * 10 and len(speeds["rows"]) == 2
    assert max(row["gain"] for row in compared["rows"]) <= 100
    assert {row["gain"] for row in compared["rows"] if row["allocator"] == "uniform"} == {0}
    assert (tmp_path / "new" / "C8.json").read_text().endswith("}\n")


def test_the_lead_is_paired_and_relative_to_the_rivals_gain():
    def results(*scores):
        return [Result(np.zeros(1), score, [], 1, 0.0) for score in scores]

    runs = {("r", "l", "PPO"): results(-1.0, -3.0), ("r", "l", "DP + local search"): results(-2.0, -4.0),
            ("r", "l", "uniform"): results(-8.0, -8.0)}
    found = allocators.lead(runs, "r", "l")
    assert found.value == pytest.approx(20) and found.lo == pytest.approx(20)  # 1 of a gain of 5, in both pairs


@pytest.mark.parametrize("level, meaning", [(1.0, "within 100% of the least known;"), (0.01, "that of the median tun")])
def test_penalty_in_miniature(level, meaning, published, monkeypatch, tmp_path):
    """Two updates come within 100 % of the least known drop, but not within 1 %."""
    for name, value in (("SEEDS", range(3)), ("TUNING", range(100, 102)), ("GRID", 2), ("UPDATES", 2),
                        ("EVALUATIONS", 600), ("LEVEL", level)):
        monkeypatch.setattr(penalty, name, value)
    penalty.main()
    check(published[0], "C3", tmp_path)
    tested, grid = published[0]["tables"]
    assert len(tested["rows"]) == 3 and len(grid["rows"]) == 2
    assert f"until a plan's drop is {meaning}" in published[0]["conditions"]
    assert sum(row["censored"] for row in tested["rows"]) < 9 and sum(row["censored"] for row in grid["rows"]) < 4
    first = {row["penalty"].partition(",")[0]: row["lambda_first"] for row in tested["rows"]}
    assert first["λ(t) as published"] < 0.01 < first["λ(t)"]  # the published sign weakens, the corrected one grows


def test_episodes_are_counted_to_the_first_hit_and_censored_openly():
    runs = [penalty.Run(np.array([3.0, 1.0, 2.0, 0.5]), np.zeros(4)), penalty.Run(np.full(4, 9.0), np.zeros(4))]
    assert runs[0].reached(1.0) == 2 and runs[0].reached(0.6) == 4 and runs[1].reached(1.0) is None
    assert penalty.counts(runs, 1.0).tolist() == [2, 4] and penalty.censored(runs, 1.0) == 1
    tested = {penalty.CONSTANT: runs, "other": [runs[1], runs[1]]}
    assert penalty.speedup(tested, "other", 1.0).value == pytest.approx(np.sqrt(0.5))


def test_the_target_is_the_median_tuning_run_where_none_comes_near(published, monkeypatch):
    def run(*drops):
        return penalty.Run(np.array(drops), np.zeros(len(drops)))

    monkeypatch.setattr(penalty, "known", lambda problem, found: 1.0)
    tested = {"λ": [run(1.0)]}  # what is tested must not choose its own target
    far = {"a": [run(9.0, 4.0), run(5.0)], "b": [run(6.0)]}
    assert penalty.target(penalty.load(), far, tested).drop == 5.0
    assert penalty.target(penalty.load(), far | {"b": [run(1.005)]}, tested).drop == 1.01


def test_the_accuracy_falls_from_dense_to_chance(published, monkeypatch):
    problem = penalty.load()
    reward = penalty.AccuracyLike(problem)
    full, none = reward.score(np.stack([problem.space.sizes, np.zeros(12, int)]))
    assert full == pytest.approx(0.93) and none == pytest.approx(0.1 + 0.83 / np.e)  # all errors 1: mean error 1
    half = reward.score(problem.space.uniform[None])[0]
    assert none < half < full



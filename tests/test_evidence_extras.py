"""Ranks, the front over several budgets, and the plan's list of tables, on known answers."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from hobs_rspar.config import load
from hobs_rspar.evidence import experiment_plan, front, ranks
from hobs_rspar.evidence.report import write
from synthetic_cells import edit, make_study


def summary(top1: dict[str, list[float]]) -> SimpleNamespace:
    return SimpleNamespace(methods={name: SimpleNamespace(top1=dict(enumerate(values)))
                                    for name, values in top1.items()})


def test_ranks_and_friedman_are_scipys():
    values = {"a": [90 + seed % 3 for seed in range(10)], "b": [89.5] * 10, "c": [80.0 + seed for seed in range(10)]}
    found = ranks.ranked(summary(values), 0.05)
    assert list(found.average) == ["a", "b", "c"] and sum(found.average.values()) == pytest.approx(6)
    assert found.p_value == pytest.approx(stats.friedmanchisquare(*values.values()).pvalue)


@pytest.mark.parametrize(("methods", "quantile"), [(2, 1.960), (5, 2.728), (10, 3.164)])
def test_critical_differences_are_demsars(methods, quantile):
    """Table 5 of Demsar 2006, level 0.05."""
    expected = quantile * (methods * (methods + 1) / (6 * 12)) ** 0.5
    assert ranks.critical_difference(methods, 12, 0.05) == pytest.approx(expected, rel=1e-3)


def test_cliques_are_the_longest_runs():
    found = ranks.Ranks({"a": 1.0, "b": 1.5, "c": 2.2, "d": 4.0}, 10, 0.0, critical=1.3)
    assert found.cliques == [("a", "c")]


def test_few_seeds_or_methods_have_no_ranks():
    assert "share 3 seeds; 10 would do" in ranks.ranked(summary({name: [1.0, 2.0, 3.0] for name in "abc"}), 0.05)
    assert "three methods" in ranks.ranked(summary({name: [1.0] * 12 for name in "ab"}), 0.05)


def test_ten_seeds_draw_the_ranks(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, ["l1", "l1_repair", "hobs_rspar"], range(10)))
    write(load())
    found = list(csv.DictReader(Path("reports/default/figures/critical_differences.csv").read_text().splitlines()))
    assert [float(row["rank"]) for row in found] == sorted(float(row["rank"]) for row in found)
    assert {row["blocks"] for row in found} == {"10"}


def test_the_front_by_hand():
    rows = [{"speedup": speed, "macs_ratio": 0.5, "top1": top1} for speed, top1 in
            [(1, 93), (2, 92), (2, 91), (3, 90), (2.5, 89), (3, 90)]]
    assert front.on_the_front(rows) == [True, True, False, True, False, True]
    untimed = [row | {"speedup": None} for row in rows[:1]]
    assert front.on_the_front(untimed + rows[1:]) == [False, True, False, True, False, True]


@pytest.fixture(scope="module")
def reported(tmp_path_factory) -> Path:
    """Three studies of two methods that differ in their budget only, with their reports; made once."""
    root = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr("hobs_rspar.evidence.report.draw_all", lambda evidence, summary: [])
        for name, macs in (("p", 0.26), ("p_50", 0.5), ("p_70", 0.7)):
            budget = {"macs": macs, "latency_ms": None, "latency_ratio": None}
            make_study(root, ["l1", "hobs_rspar"], [1, 2], name, budget=budget)
            for file in Path(f"reports/{name}/cells").glob("*.json"):
                edit(file, lambda cell, macs=macs: cell.update(budget={"macs": macs}))
            write(load())
    return root / "reports"


@pytest.fixture
def family(tmp_path, reported) -> Path:
    """A copy of the three studies' reports."""
    return Path(shutil.copytree(reported, tmp_path / "reports"))


def test_studies_that_differ_in_the_budget_make_a_front(family):
    front.update(family)
    rows = list(csv.DictReader((family / "p_front.csv").read_text().splitlines()))
    assert [(row["method"], row["budget"]) for row in rows] == [
        (method, f"{macs}x MACs") for method in ("l1", "hobs_rspar") for macs in (0.7, 0.5, 0.26)]
    assert all(float(row["speedup_lo"]) <= float(row["speedup"]) <= float(row["speedup_hi"]) for row in rows)
    assert "too few to speak of a front; 5 would do" in (family / "p_front.md").read_text()
    drawn = {kind: (family / f"p_front.{kind}").read_bytes() for kind in ("svg", "png")}
    assert drawn["svg"].startswith(b"<?xml") and drawn["png"][1:4] == b"PNG"
    (family / "p_front.svg").write_text("kept while the numbers are")
    front.update(family)
    assert (family / "p_front.svg").read_text() == "kept while the numbers are"
    (family / "p_front.csv").write_text("other numbers")
    front.update(family)
    assert (family / "p_front.svg").read_bytes() == drawn["svg"]


def test_studies_of_another_dense_network_are_no_family(family):
    for file in (family / "p_70" / "cells").glob("*.json"):
        edit(file, lambda cell: cell["dense"].update(top1_test=1.0))
    front.update(family)
    assert front.families(family) == {} and not list(family.glob("p_front*"))


def test_studies_that_another_processor_timed_are_no_family(family):
    for file in (family / "p_70" / "platforms").glob("*/*.json"):
        edit(file, lambda timing: timing["fingerprint"].update(torch_kernels="another"))
    assert front.families(family) == {}


def test_studies_of_other_seeds_are_no_family(family):
    (family / "p_70" / "cells" / "l1-2.json").unlink()
    assert front.families(family) == {}


def test_every_table_of_the_plan_is_somewhere():
    rows = experiment_plan.where(["T1", "T5"]).rows
    assert [row["table"] for row in rows] == [f"T{number}" for number in range(1, 17)]
    assert {row["table"] for row in rows if row["where"] == experiment_plan.HERE} == {"T1", "T5"}
    assert all(row["where"] for row in rows) and json.dumps(rows)

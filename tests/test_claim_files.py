"""Results of the experiments: what may be written, what is read, and what the report makes of them."""

import copy
import csv
import json
import math
from pathlib import Path

import pytest

from hobs_rspar.config import load
from hobs_rspar.errors import UserError
from hobs_rspar.evidence import claim_files, report
from synthetic_cells import make_study

RECORD = {
    "claim": "C8", "measured": 0.012, "lo": 0.004, "hi": 0.02, "unit": "reward above DP", "holds": True, "reason": "",
    "conditions": "10 seeds, 500 evaluations each", "seconds": 12.3,
    "tables": [{"name": "T10_allocators", "title": "T10b. Allocators: invented", "note": "Invented.",
                "columns": [["allocator", "Allocator"], ["reward", "Reward"], ["evaluations", "Evaluations"]],
                "rows": [{"allocator": "ppo", "reward": -0.123456, "evaluations": 500},
                         {"allocator": "dp", "reward": None, "evaluations": 1}]}]}
FILE = Path("reports/default/claims/allocators.json")


def changed(**changes) -> dict:
    return copy.deepcopy(RECORD) | changes


def table_with(**changes) -> dict:
    return changed(tables=[RECORD["tables"][0] | changes])


def test_what_is_written_is_read(tmp_path):
    claim_files.write(tmp_path / "claims" / "allocators.json", RECORD)
    claim_files.write(tmp_path / "claims" / "predictors.json", changed(
        claim=None, measured=None, lo=None, hi=None, holds=None, tables=[]))
    found = claim_files.read(tmp_path / "claims")
    assert list(found) == ["allocators", "predictors"] and not found["predictors"].judged
    assert found["allocators"].model_dump(mode="json") == RECORD
    assert claim_files.read(tmp_path / "nothing") == {}


@pytest.mark.parametrize(("record", "message"), [
    (changed(mesured=1), "mesured: Extra inputs"),
    ({"claim": "C8"}, "measured: Field required"),
    (changed(claim="C4"), "claim: String should match"),
    (changed(measured=math.nan), "measured: Input should be a finite number"),
    (changed(holds=None), "either 'holds' is true or false and 'reason' empty"),
    (changed(reason="too slow"), "either 'holds' is true or false and 'reason' empty"),
    (changed(measured=None), "a verdict needs its number"),
    (changed(seconds=-1), "seconds: Input should be greater"),
    (table_with(name="T 1"), "tables.0.name: String should match"),
    (table_with(name="T10"), "'T10' is a table of the report itself"),
    (table_with(rows=[{"allocator": "ppo", "rewrd": 1}]), "rows have rewrd, which is no column"),
    (table_with(rows=[{"reward": math.inf}]), "tables.0.rows.0.reward"),
])
def test_a_record_that_cannot_be_is_refused(record, message, tmp_path):
    with pytest.raises(UserError, match=f"x.json: .*{message}.*run 'dvc repro claim@x'"):
        claim_files.write(tmp_path / "x.json", record)
    assert not (tmp_path / "x.json").exists()


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json is not valid JSON .*dvc repro claim@x"):
        claim_files.read(tmp_path)
    for name in ("x", "y"):
        claim_files.write(tmp_path / f"{name}.json", RECORD)
    with pytest.raises(UserError, match="x.json and y.json both have the claim 'C8'"):
        claim_files.read(tmp_path)
    claim_files.write(tmp_path / "y.json", changed(claim="predictors", holds=None, measured=None))
    with pytest.raises(UserError, match="both have the table 'T10_allocators'"):
        claim_files.read(tmp_path)


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(report, "draw_all", lambda evidence, summary: [])  # no test here looks at a figure
    monkeypatch.chdir(make_study(tmp_path, methods=("l1", "hobs_rspar"), seeds=(1, 2)))
    return tmp_path / "reports/default"


def claims_of(study: Path) -> dict[str, dict]:
    report.write(load())
    return {row["claim"]: row for row in csv.DictReader((study / "tables/claims.csv").read_text().splitlines())}


def test_the_report_takes_verdict_and_tables_from_the_file(study):
    claim_files.write(FILE, RECORD)
    row = claims_of(study)["C8"]
    assert (row["measured"], row["lo"], row["hi"], row["unit"]) == ("0.012", "0.004", "0.02", "reward above DP")
    assert row["verdict"] == "holds" and row["conditions"] == "10 seeds, 500 evaluations each; took 12 s"
    assert (study / "tables/T10_allocators.csv").read_text() == \
        "allocator,reward,evaluations\nppo,-0.123456,500\ndp,,1\n"
    assert "| ppo | -0.1235 | 500 |" in (study / "tables/T10_allocators.md").read_text()
    page = (study / "index.html").read_text()
    assert 'id="T10_allocators"' in page and "T10b. Allocators" in page and "Invented." in page
    claim_files.write(FILE, changed(holds=False))
    assert claims_of(study)["C8"]["verdict"] == "does not hold"


def test_the_report_says_why_a_claim_has_no_verdict(study):
    claim_files.write(FILE, changed(holds=None, measured=None, lo=None, hi=None, reason="no DQN here"))
    found = claims_of(study)
    assert found["C8"]["verdict"] == "not measured: no DQN here" and found["C8"]["measured"] == ""
    assert found["C1"]["verdict"] == "not measured: 'dvc repro claim@sensitivity' has not run"
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("  - sensitivity\n", ""))
    assert claims_of(study)["C1"]["verdict"] == "not measured: its experiment, sensitivity, is not among study.claims"


def test_a_broken_file_leaves_the_old_report(study):
    report.write(load())
    before = (study / "index.html").read_bytes()
    FILE.parent.mkdir()
    FILE.write_text(json.dumps({"claim": "C8"}))
    with pytest.raises(UserError, match="claims/allocators.json: measured: Field required"):
        report.write(load())
    assert (study / "index.html").read_bytes() == before

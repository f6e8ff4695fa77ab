"""The report stage on invented cells: files, columns, determinism, incomplete studies, refusals."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from hobs_rspar.config import DATASETS, NETWORKS, available_methods, load
from hobs_rspar.errors import UserError
from hobs_rspar.evidence import claims, leads, page, published, readme, stability, studies, tables, timings
from hobs_rspar.evidence.cells import read
from hobs_rspar.evidence.figures import FIGURES
from hobs_rspar.evidence.page import limitations
from hobs_rspar.evidence.report import write
from hobs_rspar.evidence.statistics import holm
from hobs_rspar.evidence.summary import summarise
from hobs_rspar.evidence.table_formats import to_csv
from hobs_rspar.hardware.latency_table import LatencyTable, Layer, Whole
from synthetic_cells import (
    FULL,
    GROUPS,
    METHODS,
    PLATFORM,
    REPAIRED,
    ROOT,
    SEEDS,
    add_speed,
    edit,
    make_cell,
    make_study,
)

T1 = ["method", "n", "top1", "top1_lo", "top1_hi", "top1_before_recovery", "macs_ratio", "params_ratio", "latency_ms",
      "throughput", "energy_j", "speedup", "delta_vs_dense", "p_adjusted"]
CLAIMS = ["claim", "published", "goal", "measured", "lo", "hi", "unit", "verdict", "conditions"]
BASELINES = [name for name in METHODS if name not in ("unpruned", "hobs_uniform", "hobs_rspar")]
DRAWN = [name for name, _, _ in FIGURES if name != "critical_differences"]  # that one needs ten seeds
EXPERIMENTS = {"C1": "sensitivity", "C2": "reconstruction", "C3": "penalty", "C8": "allocators"}
BEGIN, END = readme.markers("default")
README = f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A complete study and its report, written once; tests must not change it."""
    folder = make_study(tmp_path_factory.mktemp("study"))
    (folder / "README.md").write_text(README)
    add_speed(folder, "hobs_rspar-42")
    add_speed(folder, "l1-42")
    edit(folder / "reports/default/cells/speed/l1-42.json", lambda record: record["ceilings"].update(macs=1e7))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = write(load())
    return folder / "reports" / "default", line


@pytest.fixture
def drawn(report, tmp_path, monkeypatch):
    """A copy that a test may change, as the current folder."""
    shutil.copytree(report[0].parents[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def study(drawn, monkeypatch):
    """As ``drawn``, for tests that look at no figure: none is drawn, which takes two thirds of a report's time."""
    monkeypatch.setattr("hobs_rspar.evidence.report.draw_all", lambda evidence, summary: [])
    return drawn


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def table_of(make) -> list[dict]:
    """Rows of one table of the study in the current folder, without writing the report."""
    evidence = read(load())
    return list(csv.DictReader(io.StringIO(to_csv(make(evidence, summarise(evidence))))))


def cells_of(folder: Path, method: str) -> list[dict]:
    return [json.loads((folder / "cells" / f"{method}-{seed}.json").read_text()) for seed in SEEDS]


def timing_of(cell: str) -> Path:
    return Path("reports/default/platforms") / PLATFORM / f"{cell}.json"


def test_closing_line(report):
    assert report[1] == ("report default: 50 of 50 cells, tables and figures in reports/default/, "
                         "open reports/default/index.html")


def test_what_the_latency_table_foretold_stands_beside_what_was_measured(study):
    """Whole networks take 10 ms + their layer; one of them takes 10 % more. Half the latency is the budget."""
    assert not Path("reports/default/tables/latency.csv").exists()
    params = yaml.safe_load(Path("params.yaml").read_text())
    asked = params["study"]["budget"] = {"macs": None, "latency_ms": None, "latency_ratio": 0.35}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for file in Path("reports/default/cells").glob("*.json"):
        edit(file, lambda cell: cell.update(budget={"latency_ratio": asked["latency_ratio"]}))
    wholes = [Whole((i,), (o,), (10 + i * o) * (1.1 if (i, o) == (4, 6) else 1)) for i in (8, 4, 2) for o in (8, 6, 3)]
    layer = Layer((1, 8), (1, 8), ((1, 8), (8, 64)), 7)
    table = LatencyTable({"conv": layer}, 64, PLATFORM, tuple(wholes))
    Path("artifacts/default").mkdir(parents=True)
    Path("artifacts/default/latency.json").write_text(json.dumps(table.to_json()))
    write(load())
    left_out, *methods = rows(Path("reports/default/tables/latency.csv"))
    off = 100 * table.errors()
    assert (left_out["n"], float(left_out["off"])) == ("9", pytest.approx(np.median(off), abs=0.01))
    assert off.max() == pytest.approx(100 * (1 - 1 / 1.1), abs=0.5)
    speed = [json.loads(timing_of(f"l1-{seed}").read_text())["batches"]["64"]["speedup"] for seed in SEEDS]
    found = next(row for row in methods if row["what"] == "l1")
    assert float(found["foretold"]) == 0.35
    assert float(found["measured"]) == pytest.approx(1 / np.median(speed), abs=1e-4)
    assert float(found["off"]) == pytest.approx(100 * abs(0.35 * np.median(speed) - 1), abs=0.01)
    assert [row["what"] for row in methods] == [name for name in METHODS if name != "unpruned"]
    assert "0.35x latency" in Path("reports/default/index.html").read_text()


def test_other_platforms_stand_beside_the_studys_own_and_are_never_mixed_with_it(study):
    """Half as fast elsewhere; a timing of an earlier network there does not count."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["benchmark"]["platform"] = PLATFORM
    Path("params.yaml").write_text(yaml.safe_dump(params))
    for seed in SEEDS[:3]:
        timing = json.loads(timing_of(f"l1-{seed}").read_text())
        timing["fingerprint"]["device"] = "Other CPU"
        for side in timing["batches"]["1"]["dense"], timing["batches"]["1"]["pruned"]:
            side["p50_ms"] *= 2
        timing["inputs"] = timing["inputs"] if seed != SEEDS[2] else "earlier"
        file = Path("reports/default/platforms/other_cpu") / f"l1-{seed}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(timing))
    found = table_of(timings.t5)
    assert [row["method"] for row in found] == [*METHODS, "l1"]
    own, other = found[list(METHODS).index("l1")], found[-1]
    assert own["platform"] == PLATFORM
    assert (other["platform"], other["device"], other["n"]) == ("other_cpu", "Other CPU", "2")
    alone, = (row for row in rows(Path("reports/default/tables/T1.csv")) if row["method"] == "l1")
    now, = (row for row in table_of(tables.t1) if row["method"] == "l1")
    assert now == alone and own["latency_ms"] == alone["latency_ms"] and own["speedup"] == alone["speedup"]
    ms = [json.loads(timing_of(f"l1-{seed}").read_text())["batches"]["1"]["pruned"]["p50_ms"] for seed in SEEDS[:2]]
    assert float(other["latency_ms"]) == pytest.approx(2 * np.median(ms), abs=1e-3)


def test_every_batch_size_has_a_row(report):
    found = [row for row in rows(report[0] / "tables/T6.csv") if row["method"] == "l1"]
    timings = [json.loads((report[0] / "platforms" / PLATFORM / f"l1-{seed}.json").read_text()) for seed in SEEDS]
    assert [row["batch"] for row in found] == ["1", "64"]
    for row in found:
        entries = [timing["batches"][row["batch"]] for timing in timings]
        assert float(row["p99_ms"]) == pytest.approx(np.median([e["pruned"]["p99_ms"] for e in entries]), abs=1e-3)
        assert float(row["speedup"]) == pytest.approx(np.median([e["speedup"] for e in entries]), abs=1e-3)
    ratio = np.mean([cell["plan"]["macs_ratio"] for cell in cells_of(report[0], "l1")])
    assert float(found[0]["bound"]) == pytest.approx(1 / ratio, abs=1e-3)


def test_spread_and_cost_are_those_of_the_cells(study):
    def worse(cell):
        cell["history"][-1]["validation_loss"] = cell["history"][0]["validation_loss"] + 1

    edit(Path("reports/default/cells/l1-42.json"), worse)
    (study / "reports/default/cells/l1-520.json").unlink()
    edit(Path("reports/default/cells/random-42.json"), lambda cell: cell["cost"]["seconds"].update(prune=None))
    cells = [json.loads(file.read_text()) for file in Path("reports/default/cells").glob("l1-*.json")]
    spread, cost = ({row["method"]: row for row in table_of(make)} for make in (stability.t12, stability.t13))
    top1 = [cell["accuracy"]["test"] for cell in cells]
    assert (spread["l1"]["n"], spread["l1"]["missing"], spread["l2_global"]["missing"]) == ("4", "1", "0")
    assert float(spread["l1"]["sd"]) == pytest.approx(np.std(top1, ddof=1), abs=1e-4)
    assert int(spread["l1"]["spikes"]) == sum(
        later["validation_loss"] > earlier["validation_loss"]
        for cell in cells for earlier, later in zip(cell["history"], cell["history"][1:])) > 0
    seconds = np.array([list(cell["cost"]["seconds"].values()) for cell in cells]).mean(0)
    assert float(cost["l1"]["total"]) == pytest.approx(seconds.sum(), abs=0.02)
    assert float(cost["l1"]["allocate_share"]) == pytest.approx(100 * seconds[0] / seconds.sum(), abs=0.02)
    assert cost["random"]["prune"] == cost["random"]["total"] == "" != cost["random"]["finetune"]


def test_leads_are_paired_and_say_how_many_seeds_would_do(report):
    found = {row["rival"]: row for row in rows(report[0] / "tables/leads.csv")}
    assert set(found) == set(METHODS) - {"unpruned", "hobs_rspar"}
    assert [float(row["lead"]) for row in found.values()] == sorted(float(row["lead"]) for row in found.values())
    ours, l1 = ([cell["accuracy"]["test"] for cell in cells_of(report[0], name)] for name in ("hobs_rspar", "l1"))
    test, gains = stats.ttest_rel(ours, l1), np.subtract(ours, l1)
    row = found["l1"]
    assert [float(row[key]) for key in ("lead", "lo", "hi")] == pytest.approx(
        [gains.mean(), *test.confidence_interval(0.95)], abs=1e-3)
    assert float(row["p_value"]) == pytest.approx(test.pvalue, rel=1e-2)
    assert float(row["effect_size"]) == pytest.approx(gains.mean() / gains.std(ddof=1), rel=1e-3)


def test_seeds_for_an_effect_are_those_of_the_textbook():
    """Cohen's tables for a paired t-test at 0.05 and 80 %: 34 pairs for d = 0.5, 15 for 0.8; and by simulation."""
    assert leads.seeds_for(0.5, 0.05) == 34 and leads.seeds_for(-0.8, 0.05) == 15
    assert leads.seeds_for(0.0, 0.05) is None and leads.seeds_for(20.0, 0.05) == 3
    drawn = np.random.default_rng(0).normal(1.5, 1, (4000, leads.seeds_for(1.5, 0.01)))
    assert (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.01).mean() == pytest.approx(0.83, abs=0.04)


def test_all_studies_stand_in_one_table(study):
    """Numbers are those of each study's T1; a study without our method, and a folder without a report, have no row."""
    first = Path("reports/default")
    for name, budget in (("half", {"macs": 0.5}), ("time", {"latency_ms": 3.5})):
        shutil.copytree(first, first.with_name(name))
        for file in (first.with_name(name) / "cells").glob("hobs_rspar-*.json"):
            edit(file, lambda cell, budget=budget: cell.update(budget=budget))
    shutil.copytree(first, first.with_name("others"))
    table = first.with_name("others") / "tables/T1.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "hobs_rspar" not in line))
    first.with_name("empty").mkdir()
    found = {row["study"]: row for row in studies.across(Path("reports")).rows}
    assert list(found) == ["default", "half", "time"]
    assert [row["budget"] for row in found.values()] == ["0.26x MACs", "0.5x MACs", "3.5 ms"]
    t1 = {row["method"]: row for row in rows(first / "tables/T1.csv")}
    best = max(BASELINES, key=lambda name: float(t1[name]["top1"]))
    row = found["default"]
    assert (row["rival"], row["network"], row["images"], row["n"]) == (best, "resnet20", FULL, len(SEEDS))
    assert row["lead"] == pytest.approx(float(t1["hobs_rspar"]["top1"]) - float(t1[best]["top1"]))
    assert row["p_adjusted"] == float(t1[best]["p_adjusted"]) and row["reference"] == float(t1["unpruned"]["top1"])


def test_published_figures_stand_beside_ours_where_network_and_data_are_the_same(study, monkeypatch):
    """Rows of other networks, data sets and methods are left out; the change is from each side's own dense network."""
    assert not Path("reports/default/tables/published.csv").exists()
    figure = published.Figure("l1", "resnet20", "fashion_mnist", 94.0, 93.5, None, "Somebody, 2020", "200 epochs")
    others = [figure._replace(**{key: "other"}) for key in ("method", "network", "dataset")]
    monkeypatch.setattr(published, "FIGURES", (*others, figure))
    row, = table_of(published.beside)
    mean = np.mean([cell["accuracy"]["test"] for cell in cells_of(study / "reports/default", "l1")])
    dense = cells_of(study / "reports/default", "l1")[0]["dense"]["top1_test"]
    assert (row["method"], float(row["published_change"]), row["published_macs"]) == ("l1", -0.5, "")
    assert float(row["dense"]) == dense and float(row["change"]) == pytest.approx(mean - dense, abs=0.01)
    assert row["source"] == "Somebody, 2020"


def test_quoted_figures_are_of_methods_and_networks_that_there_are():
    for figure in published.FIGURES:
        assert figure.method in available_methods() and figure.network in NETWORKS and figure.dataset in DATASETS
        assert 80 < figure.pruned < 100 and 80 < figure.dense < 100 and (figure.macs is None or 0 < figure.macs < 1)


def test_columns_are_exactly_those_of_the_evidence_document(report):
    assert list(rows(report[0] / "tables/T1.csv")[0]) == T1
    assert list(rows(report[0] / "tables/claims.csv")[0]) == CLAIMS
    assert [row["claim"] for row in rows(report[0] / "tables/claims.csv")] == [f"C{n}" for n in range(1, 9)]


def test_t1_equals_scipy(report):
    table = {row["method"]: row for row in rows(report[0] / "tables/T1.csv")}
    top1 = {method: [cell["accuracy"]["test"] for cell in cells_of(report[0], method)] for method in METHODS}
    raw = {name: stats.ttest_rel(top1["hobs_rspar"], values).pvalue
           for name, values in top1.items() if name not in ("hobs_rspar", "unpruned")}
    ranked, floor = sorted(raw, key=raw.get), 0.0
    for step, name in enumerate(ranked):
        floor = max(floor, min(1.0, raw[name] * (len(raw) - step)))
        assert float(table[name]["p_adjusted"]) == pytest.approx(floor, rel=1e-3)
    for method, values in top1.items():
        lo, hi = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        found = [float(table[method][key]) for key in ("top1", "top1_lo", "top1_hi")]
        assert found == pytest.approx([np.mean(values), lo, hi], abs=1e-4)
    delta = np.mean(np.subtract(top1["l1"], top1["unpruned"]))
    assert float(table["l1"]["delta_vs_dense"]) == pytest.approx(delta, abs=1e-4)
    assert table["unpruned"]["delta_vs_dense"] == table["hobs_rspar"]["p_adjusted"] == table["l1"]["energy_j"] == ""


def test_t1_timings_are_medians_over_cells(report):
    row = next(row for row in rows(report[0] / "tables/T1.csv") if row["method"] == "l1")
    seen = [json.loads((report[0] / "platforms" / PLATFORM / f"l1-{seed}.json").read_text())["batches"]
            for seed in SEEDS]
    assert float(row["latency_ms"]) == pytest.approx(np.median([b["1"]["pruned"]["p50_ms"] for b in seen]), abs=1e-3)
    assert float(row["speedup"]) == pytest.approx(np.median([b["64"]["speedup"] for b in seen]), abs=1e-3)


def test_verdicts_follow_from_the_numbers(report):
    claims = {row["claim"]: row for row in rows(report[0] / "tables/claims.csv")}
    for name, experiment in EXPERIMENTS.items():
        assert claims[name]["verdict"] == f"not measured: 'dvc repro claim@{experiment}' has not run"
        assert claims[name]["measured"] == ""
    assert claims["C5"]["verdict"] == "not measured: no RAPL counter on this machine"
    speed = claims["C4"]
    assert speed["verdict"] == ("holds" if float(speed["lo"]) >= 3.1 else "does not hold")
    assert claims["C6"]["verdict"] == "does not hold" and float(claims["C6"]["lo"]) < -0.17
    leads = {row["rival"]: row for row in rows(report[0] / "figures/paired_differences.csv")}
    weakest = min(BASELINES, key=lambda name: float(leads[name]["difference"]))
    assert float(claims["C7"]["measured"]) == pytest.approx(float(leads[weakest]["difference"]), abs=1e-4)
    assert f"over {weakest} of 7 baselines" in claims["C7"]["conditions"]


def claims_now(evidence, summary):
    return claims.table(evidence, summary, claims.claims(evidence, summary))


def test_c6_is_the_difference_of_t1_though_tied_logits_make_other_bits(study):
    def flipped(cell: dict) -> None:
        bits = bytearray(base64.b64decode(cell["correct"]))
        bits[0] ^= 0xFF
        cell["correct"] = base64.b64encode(bits).decode()

    edit(Path("reports/default/cells/hobs_rspar-42.json"), flipped)
    t1 = {row["method"]: row for row in table_of(tables.t1)}
    c6 = {row["claim"]: row for row in table_of(claims_now)}["C6"]
    assert c6["measured"] == t1["hobs_rspar"]["delta_vs_dense"] and float(c6["lo"]) < float(c6["measured"])


def test_c7_is_judged_at_none_short_and_full_recovery(tmp_path, monkeypatch):
    """Recomputed from the cells: ahead of all at each length, and by the margin of the best repaired baseline."""
    monkeypatch.chdir(make_study(tmp_path, curve=(5000, 20_000)))
    write(load())
    claim = next(row for row in rows(tmp_path / "reports/default/tables/claims.csv") if row["claim"] == "C7")
    expected, impossible = [], 0
    for place, margin in ((0, 4.0), (2, 1.0), (3, None)):
        top1 = {method: np.array([cell["recovery_curve"][place]["top1_test"] for cell in
                                  cells_of(tmp_path / "reports/default", method)]) for method in METHODS}
        tests = {name: stats.ttest_rel(top1["hobs_rspar"], top1[name]) for name in METHODS
                 if name not in ("unpruned", "hobs_rspar")}
        adjusted = holm({name: test.pvalue for name, test in tests.items()})
        holds = all((top1["hobs_rspar"] - top1[name]).mean() > 0 and adjusted[name] < 0.05 for name in BASELINES)
        if margin is not None:
            best = max(("random_repair", "l1_repair"), key=lambda name: top1[name].mean())
            holds &= tests[best].confidence_interval(0.95).low >= margin
            impossible += top1[best].mean() + margin > top1["unpruned"].mean()
        expected.append("holds" if holds else "does not hold")
    found = re.findall(r"(none|short \(20,000 images\)|full): (holds|does not hold|not measured)", claim["conditions"])
    assert [verdict for _, verdict in found] == expected and len(found) == 3
    assert claim["verdict"] == ("holds" if set(expected) == {"holds"} else "does not hold")
    assert claim["conditions"].count("which would be more than unpruned has") == impossible


def test_c7_says_what_is_not_measured(report):
    claim = next(row for row in rows(report[0] / "tables/claims.csv") if row["claim"] == "C7")
    assert "short (20,000 images): not measured; full: " in claim["conditions"]


def test_c7_does_not_hold_for_want_of_repaired_controls(tmp_path, monkeypatch):
    """Ahead of plain baselines everywhere, but repair could pass for the criterion."""
    methods = [name for name in METHODS if name not in ("random_repair", "l1_repair")]
    monkeypatch.chdir(make_study(tmp_path, methods=methods))
    for file in Path("reports/default/cells").glob("hobs_rspar-*.json"):
        edit(file, lambda cell: [point.update(top1_test=99.0) for point in cell["recovery_curve"]])
    write(load())
    claim = next(row for row in rows(Path("reports/default/tables/claims.csv")) if row["claim"] == "C7")
    assert claim["verdict"].startswith("not measured: repair could pass for the criterion") and not claim["measured"]
    assert "no repaired control (random_repair, l1_repair) among them" in claim["verdict"]


def test_recovery_table_and_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, curve=(5000, 20_000)))
    write(load())
    folder = tmp_path / "reports/default"
    table = {(row["method"], int(row["images"])): row for row in rows(folder / "tables/recovery.csv")}
    assert {images for _, images in table} == {0, 5000, 20_000, FULL} and len(table) == 40
    ours, rival = ([cell["recovery_curve"][1] for cell in cells_of(folder, name)] for name in ("hobs_rspar", "l1"))
    row, test = table["l1", 5000], stats.ttest_rel(*([p["top1_test"] for p in points] for points in (ours, rival)))
    lo, hi = stats.t.interval(0.95, 4, loc=np.mean([p["top1_test"] for p in rival]),
                              scale=stats.sem([p["top1_test"] for p in rival]))
    assert [float(row[key]) for key in ("top1_lo", "top1_hi")] == pytest.approx([lo, hi], abs=1e-4)
    interval = test.confidence_interval(0.95)
    assert [float(row[key]) for key in ("lead_lo", "lead_hi")] == pytest.approx([*interval], abs=1e-4)
    assert float(row["p_adjusted"]) >= test.pvalue and row["seen"] == "4992"
    assert table["hobs_rspar", 0]["lead"] == table["unpruned", 0]["lead"] == ""
    main = {row["method"]: row for row in rows(folder / "tables/T1.csv")}
    assert all(table[name, FULL]["top1"] == main[name]["top1"] for name in METHODS)
    drawn = rows(folder / "figures/recovery_budget.csv")
    assert len(drawn) == 40 and {row["n"] for row in drawn} == {"5"}
    page = (folder / "index.html").read_text()
    assert 'id="recovery"' in page and 'id="recovery_budget"' in page and "20,000 images" in page


def test_training_before_recovery_is_shown_and_taken_from_it(tmp_path, monkeypatch):
    """Extra images leave l1 a recovery of 5,000 images, taylor none of any, random less than nothing."""
    monkeypatch.chdir(make_study(tmp_path, curve=(5000, 20_000)))
    folder = tmp_path / "reports/default"
    write(load())
    assert not (folder / "tables/cost.csv").exists()  # nobody trained before: equal recovery is equal cost
    extra = {"l1": 90_000, "taylor_oneshot": FULL // 128 * 128, "random": 200_000}
    for method, images in extra.items():
        for seed in SEEDS:
            edit(folder / f"cells/{method}-{seed}.json", lambda cell, n=images: cell["cost"].update(
                extra_training_images=n))
    write(load())
    table, curve = ({(row["method"], row.get("images")): row for row in rows(folder / f"tables/{name}.csv")}
                    for name in ("cost", "recovery"))
    table = {method: row for (method, _), row in table.items()}
    assert list(table) == list(METHODS)
    assert {table[name]["images"] for name in METHODS if name not in extra} == {str(FULL)}
    for method, images in (("l1", "5000"), ("taylor_oneshot", "0")):
        assert table[method]["images"] == images and float(table[method]["extra"]) == extra[method]
        assert table[method]["top1"] == curve[method, images]["top1"] != table[method]["top1_equal_recovery"]
    assert table["random"]["top1"] == table["random"]["lead"] == "" != table["random"]["top1_equal_recovery"]
    ours = [cell["accuracy"]["test"] for cell in cells_of(folder, "hobs_rspar")]
    rival = [cell["recovery_curve"][1]["top1_test"] for cell in cells_of(folder, "l1")]
    interval = stats.ttest_rel(ours, rival).confidence_interval(0.95)
    assert [float(table["l1"][key]) for key in ("lead_lo", "lead_hi")] == pytest.approx([*interval], abs=1e-4)
    note = (folder / "tables/T1.md").read_text()
    assert "Trained before recovery, too: random (200,000 images), l1 (90,000 images), taylor_oneshot" in note


def test_repair_table_has_a_row_per_method_and_a_column_per_step(report):
    table = {row["method"]: row for row in rows(report[0] / "tables/repair.csv")}
    for method, row in table.items():
        cells = cells_of(report[0], method)
        for step in ("cut", "batchnorm", "refit"):
            found = [cell["repair_steps"][step]["top1"] for cell in cells if step in cell["repair_steps"]]
            assert row[step] == "" if not found else float(row[step]) == pytest.approx(np.mean(found), abs=1e-4)
        assert row["n"] == "5" and row["repair"] == ("least_squares" if method in REPAIRED else "none")
        assert float(row["recovered"]) == pytest.approx(np.mean([c["accuracy"]["validation"] for c in cells]), abs=1e-4)
    assert table["l1"]["error_refit"] == "" != table["l1_repair"]["error_refit"]


def test_t8_lists_the_variants_that_ran_and_says_why_the_others_did_not(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, methods=("l1", "hobs_uniform", "hobs_rspar")))
    for seed in SEEDS[:3]:
        make_cell(tmp_path, "hobs_rspar_no_repair", seed)
    params = load()
    methods = [*params.study.methods, "hobs_rspar_no_repair", "hobs_rspar_no_penalty"]
    write(params.model_copy(update={"study": params.study.model_copy(update={"methods": methods})}))
    table = {row["variant"]: row for row in rows(tmp_path / "reports/default/tables/T8.csv")}
    assert list(table)[0] == "hobs_rspar" and table["hobs_rspar"]["n"] == "5"
    ours = {cell["seed"]: cell["accuracy"]["test"] for cell in cells_of(tmp_path / "reports/default", "hobs_rspar")}
    without = [json.loads((tmp_path / f"reports/default/cells/hobs_rspar_no_repair-{seed}.json").read_text())
               for seed in SEEDS[:3]]
    test = stats.ttest_rel([cell["accuracy"]["test"] for cell in without], [ours[seed] for seed in SEEDS[:3]])
    row = table["hobs_rspar_no_repair"]
    assert [float(row["lo"]), float(row["hi"])] == pytest.approx([*test.confidence_interval(0.95)], abs=1e-4)
    assert row["n"] == "3" and float(table["hobs_uniform"]["p_adjusted"]) < 1
    assert table["hobs_rspar_no_penalty"]["remark"] == "not measured: no cell of it is there yet"
    assert table["hobs_rspar_no_curvature"]["remark"] == "not measured: it is not among study.methods"
    assert table["distillation"]["remark"].startswith("not measured: distillation is in all")


def test_t10_and_t16(report):
    ratios = {row["method"]: row for row in rows(report[0] / "tables/T10.csv")}
    kept = [group["kept_count"] for cell in cells_of(report[0], "hobs_rspar") for group in cell["plan"]["groups"]
            if group["name"] == "conv1"]
    assert float(ratios["hobs_rspar"]["conv1"]) == pytest.approx(np.mean(kept) / GROUPS["conv1"], abs=1e-4)
    runs = [row for row in rows(report[0] / "tables/T16.csv") if row["method"] == "random"]
    assert [row["seed"] for row in runs] == [*map(str, SEEDS), "mean", "sd"]
    values = [float(row["top1"]) for row in runs[:5]]
    assert float(runs[6]["top1"]) == pytest.approx(np.std(values, ddof=1), abs=1e-3)


def test_metrics_are_a_few_rows_per_method(report):
    metrics = json.loads((report[0] / "metrics.json").read_text())
    assert metrics["dense"] == {"top1": 93.3} and metrics["study"] == {"cells": 50, "missing": []}
    assert list(metrics) == ["dense", *METHODS, "study"]
    assert set(metrics["l1"]) == {"top1", "macs_ratio", "speedup", "delta_vs_dense"}


def test_markdown_and_latex_are_well_formed(report):
    for name in ("T1", "T8", "T10", "T16", "claims", "recovery", "repair"):
        lines = [line for line in (report[0] / "tables" / f"{name}.md").read_text().splitlines() if line[:1] == "|"]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and re.match(r"[|\- :]+$", lines[1])
        latex = (report[0] / "tables" / f"{name}.tex").read_text()
        body = [line for line in latex.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in body}) == 1
        assert all(part in latex for part in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}"))
        assert all(line.isascii() for line in body) and not any(re.search(r"(?<!\\)[%#_]", line) for line in body)


def test_page_is_one_file_without_requests(report):
    whole = (report[0] / "index.html").read_text()
    page = re.sub(r"(<script[^>]*>).*?</script>", r"\1", whole, flags=re.DOTALL)  # test_page.py runs what is in them
    assert page.count("<script") == 3 and "<script src" not in page
    assert "http://" not in page and "https://" not in page and "@import" not in page
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    local = [source for source in sources if not source.startswith(("data:", "#"))]
    assert local and all((report[0] / source).is_file() for source in local)
    assert page.count("<figure") == len(FIGURES) and page.count("data:image/svg+xml;base64,") == len(DRAWN)
    places = [page.index(f'id="{name}"') for name in ("claims", "T1", "figures", "recovery", "repair", "T8", "T10",
                                                      "T16", "missing")]
    assert places == sorted(places)
    assert page.count("Not drawn: all methods share 5 seeds; 10 would do") == page.count("Not drawn") == 1
    assert "/tmp" not in page
    anchors = {source[1:] for source in sources if source.startswith("#")}
    assert {"T1", "T6", "recovery"} <= anchors and all(f'id="{anchor}"' in page for anchor in anchors)


def test_a_slow_phase_of_the_machine_changes_no_latency_and_no_throughput(study):
    """Cells of one method fall into a phase in which everything takes twice as long, the dense network, too."""
    before = summarise(read(load())).methods["l1"]

    def slower(timing: dict) -> None:
        for entry in timing["batches"].values():
            for network in ("dense", "pruned"):
                entry[network]["p50_ms"] *= 2
                entry[network]["throughput"] /= 2

    for seed in SEEDS:
        edit(study / f"reports/default/platforms/{PLATFORM}/l1-{seed}.json", slower)
    after = summarise(read(load())).methods["l1"]
    assert after.latency.value == pytest.approx(before.latency.value, rel=0.05)
    assert after.throughput == pytest.approx(before.throughput, rel=0.05)


def test_a_method_without_a_docstring_is_no_reason_to_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "METHODS", tmp_path)
    (tmp_path / "mine.py").write_text("def plan(context, options): ...")
    assert page.about("mine") == ("methods/mine.py has no docstring yet.", [])


def test_a_dense_network_from_elsewhere_is_a_limitation(study):
    evidence = read(load())
    told = "has probably seen our validation images"
    assert not any(told in line for line in limitations(evidence, summarise(evidence)))
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["pretrain"]["source"] = "torchvision"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert told in limitations(read(load()), summarise(evidence))[0]


def test_figures_have_svg_png_and_data(report):
    for name in DRAWN:
        svg = (report[0] / "figures" / f"{name}.svg").read_text()
        assert "<dc:date>" not in svg
        assert (report[0] / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert len(rows(report[0] / "figures" / f"{name}.csv")) > 1


def test_a_study_has_one_roofline(report):
    """Cells are timed minutes apart, and each saw other ceilings; the highest are the machine's."""
    layers = rows(report[0] / "tables/T14_layers.csv")
    assert {row["network"] for row in layers} == {"dense", "hobs_rspar", "l1"}
    for row in layers:
        assert float(row["roof"]) == pytest.approx(min(0.02, 0.01 * float(row["intensity"])))


def test_dvc_plots_data(report):
    recovery = rows(report[0] / "plots/recovery.csv")
    assert list(recovery[0]) == ["method", "images", "validation_top1"]
    assert list(dict.fromkeys(row["method"] for row in recovery)) == list(METHODS)
    assert len(rows(report[0] / "plots/accuracy.csv")) == 50


def test_scores_of_another_dense_network_are_not_drawn(drawn):
    """Studies of one network on one data set share its folder, where the other's may lie."""
    edit(drawn / "artifacts/dense/fashion_mnist_resnet20/dense.json", lambda record: record.update(top1_test=12.3))
    write(load())
    page = (drawn / "reports/default/index.html").read_text()
    assert "of another dense network than the cells" in page and "Dense training" not in page
    assert not (drawn / "reports/default/figures/sensitivity.svg").exists()


def test_second_run_writes_the_same_bytes_and_removes_what_is_stale(drawn):
    folder = drawn / "reports" / "default"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (folder / "figures" / "old.svg").write_text("left by an earlier version")
    write(load())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_readme_block_equals_the_report(study):
    assert readme.update("README.md", "reports/default")
    text = (study / "README.md").read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n") and text.endswith(f"{END}\n\nafter\n") and "old" not in text
    assert readme.render("reports/default") in text and not readme.update("README.md", "reports/default")
    assert "| hobs_rspar | " in text and "n = 5 seeds" in text and "Test CPU" in text
    (study / "README.md").write_text(text.replace("hobs_rspar", "mine", 1))
    assert readme.update("README.md", "reports/default") and (study / "README.md").read_text() == text
    (study / "README.md").write_text("no block of this study")
    assert not readme.update("README.md", "reports/default")
    (study / "README.md").write_text(text.replace(END, ""))
    with pytest.raises(UserError, match="default:begin"):
        readme.update("README.md", "reports/default")


def test_incomplete_study_is_reported_as_such(study, capsys):
    for cell in ("l1-42", "hobs_rspar-520"):
        (study / "reports/default/cells" / f"{cell}.json").unlink()
    (study / "reports/default/cells/gone-1.json").write_text("{}")
    assert "48 of 50 cells" in write(load())
    warnings = capsys.readouterr().err
    assert "l1-42" in warnings and "gone-1.json" in warnings
    assert json.loads((study / "reports/default/metrics.json").read_text())["study"] == {
        "cells": 48, "missing": ["l1-42", "hobs_rspar-520"]}
    page = (study / "reports/default/index.html").read_text()
    assert "This study is incomplete" in page and "n = 4 to 5 seeds" in page and "l1-42, hobs_rspar-520" in page
    table = {row["method"]: row for row in rows(study / "reports/default/tables/T1.csv")}
    assert (table["l1"]["n"], table["random"]["n"]) == ("4", "5")


def test_a_cell_of_an_earlier_network_is_a_warning(study, capsys):
    """Where the present network is at hand; elsewhere nobody can tell."""
    folder = study / "artifacts/default/cells/l1-42"
    folder.mkdir(parents=True)
    for name in ("plan.json", "recovered.safetensors"):
        (folder / name).write_bytes(b"recovered anew")
    write(load())
    assert "of earlier networks than those in artifacts/: l1-42; 'dvc repro'" in capsys.readouterr().err


def test_timing_of_an_earlier_network_is_not_shown(study, capsys):
    edit(timing_of("l1-42"), lambda timing: timing.update(inputs="1" * 64))
    edit(timing_of("l1-520"), lambda timing: timing.update(flags=["batch 64: something else was running"]))
    write(load())
    assert "no timing of the present network on test_cpu for: l1-42" in capsys.readouterr().err
    runs = {(row["method"], row["seed"]): row for row in rows(study / "reports/default/tables/T16.csv")}
    assert runs["l1", "42"]["speedup"] == runs["l1", "mean"]["speedup"] == "" != runs["l1", "520"]["speedup"]
    page = (study / "reports/default/index.html").read_text()
    assert "l1-520: batch 64: something else was running" in page and "flagged the timing of l1-520" in page


def test_figures_of_the_search_are_means_over_seeds(report):
    """72 policy updates of five seeds: recomputed at one drawn point; and every plan that was measured."""
    searches = [cell["search"] for cell in cells_of(report[0], "hobs_rspar")]
    reward, weight = (rows(report[0] / f"figures/{name}.csv") for name in ("reward_curve", "lambda_curve"))
    assert len(reward) == len(weight) == 48 and [row["update"] for row in reward] == [row["update"] for row in weight]
    point = float(reward[3]["update"])  # 72 updates in 48 bins: the first 24 hold two
    updates = [int(point - 1.5), int(point - 0.5)]
    for row, key, name, scale in ((reward[3], "reward", "reward", 1), (weight[3], "lambda", "lambda", 1),
                                  (weight[3], "drop", "accuracy_drop", 100)):
        found = [scale * np.mean([search["episodes"][update][name] for update in updates]) for search in searches]
        assert float(row[key]) == pytest.approx(np.mean(found), rel=1e-5)
        assert float(row["lo" if key == "reward" else f"{key}_lo"]) == pytest.approx(
            stats.t.interval(0.95, 4, loc=np.mean(found), scale=stats.sem(found))[0], rel=1e-5)
    drawn = rows(report[0] / "figures/measured_plans.csv")
    wanted = [(plan["updates"], 100 * plan["accuracy_drop"]) for search in searches for plan in search["measured"]]
    assert len(drawn) == 5 * 24 and sorted((int(row["updates"]), float(row["drop"])) for row in drawn) == [
        pytest.approx(pair, rel=1e-5) for pair in sorted(wanted)]
    assert {row["method"] for row in drawn} == {"hobs_rspar"} and len({row["seed"] for row in drawn}) == 5
    page = (report[0] / "index.html").read_text()
    assert "up to 2 policy updates of a seed" in page


def test_enough_seeds_add_the_bootstrap_and_wilcoxon(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, methods=("l1", "hobs_rspar"), seeds=range(10), name="toy"))
    write(load())
    (row,) = rows(tmp_path / "reports/toy/figures/paired_differences.csv")
    assert float(row["wilcoxon_p"]) == pytest.approx(2 / 2**10, abs=1e-6)
    assert (row["lo"], row["hi"]) == (row["bootstrap_lo"], row["bootstrap_hi"])


def test_one_seed_gives_no_intervals_and_no_p(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, methods=METHODS[-3:], seeds=SEEDS[:1], name="toy"))
    write(load())
    table = rows(tmp_path / "reports/toy/tables/T1.csv")
    assert all(row["top1_lo"] == row["p_adjusted"] == row["delta_vs_dense"] == "" for row in table)
    claims = {row["claim"]: row["verdict"] for row in rows(tmp_path / "reports/toy/tables/claims.csv")}
    assert claims["C6"].startswith("not measured: unpruned is not among study.methods")
    assert "2 seeds would do" in claims["C7"] and claims["C4"] in ("holds", "does not hold")
    page = (tmp_path / "reports/toy/index.html").read_text()
    assert "Not drawn: hobs_rspar shares two seeds with no other method" in page


def test_without_timings_scores_or_our_method_the_report_says_why(tmp_path, monkeypatch):
    monkeypatch.chdir(make_study(tmp_path, methods=METHODS[:2], seeds=SEEDS[:2], name="toy"))
    shutil.rmtree(tmp_path / "reports/toy/platforms")
    (tmp_path / "artifacts/dense/fashion_mnist_resnet20/scores.json").unlink()
    write(load())
    page = (tmp_path / "reports/toy/index.html").read_text()
    for reason in ("no cell has a timing at batch 1", "scores.json is absent", "learns by policy updates"):
        assert reason in page
    assert not (tmp_path / "reports/toy/figures/accuracy_latency.svg").exists()
    claims = rows(tmp_path / "reports/toy/tables/claims.csv")
    assert claims[3]["verdict"] == "not measured: hobs_rspar is not among study.methods"


def second_platform(study: Path) -> None:
    folder = study / "reports/default/platforms"
    shutil.copytree(folder / PLATFORM, folder / "other_gpu")


def test_the_precision_of_recovery_is_said(study):
    """Cells of two machines may differ in it; those of earlier versions don't say."""
    assert "in fp32, the dense network as teacher" in tables.recovery_in_words(read(load()))
    edit(study / "reports/default/cells/l1-42.json", lambda cell: cell.update(precision="bf16"))
    edit(study / "reports/default/cells/l1-2024.json", lambda cell: cell.pop("precision"))
    assert "in bf16 and fp32, the dense" in tables.recovery_in_words(read(load()))


def test_a_platform_that_timed_earlier_networks_alone_does_not_stand_in_the_way(study):
    """What a fresh clone on another machine finds: the committed timings belong to networks that are no more."""
    second_platform(study)
    for file in (study / "reports/default/platforms/other_gpu").glob("*.json"):
        edit(file, lambda timing: timing.update(inputs="earlier"))
    assert read(load()).platform == PLATFORM


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda study: shutil.rmtree(study / "reports/default/cells"), "none of the 50 cells.*dvc repro"),
    (lambda study: edit(timing_of("l1-42"), lambda t: t["fingerprint"].update(device="X")), "device differs.*l1-42"),
    (lambda study: edit(timing_of("l1-42"), lambda t: t["fingerprint"].update(threads=2)), "threads differs"),
    (lambda study: edit(timing_of("l1-42"), lambda t: t["fingerprint"].update(torch="2.11.0")), "torch differs"),
    (second_platform, r"2 platforms \(other_gpu, test_cpu\); set benchmark.platform"),
    (lambda study: (study / "reports/default/cells/l1-42.json").write_text('{"cell": '), "42.json is not valid JSON"),
    (lambda study: edit(study / "reports/default/cells/l1-42.json", lambda c: c.pop("plan")), "has no 'plan'"),
    (lambda study: edit(study / "reports/default/cells/l1-42.json", lambda c: c.update(budget={"macs": 0.5})),
     "budget is {'macs': 0.5}, but params.yaml says {'macs': 0.26}"),
    (lambda study: edit(study / "reports/default/cells/l1-42.json", lambda c: c["dense"].update(top1_test=90.0)),
     "2 different dense networks.*l1-42"),
])
def test_refusals_name_the_file_and_leave_the_old_report(study, spoil, message):
    before = (study / "reports/default/index.html").read_bytes()
    spoil(study)
    with pytest.raises(UserError, match=message):
        write(load())
    assert (study / "reports/default/index.html").read_bytes() == before


def test_platform_named_in_params(study):
    second_platform(study)
    text = (study / "params.yaml").read_text()
    (study / "params.yaml").write_text(text.replace("platform: null", f"platform: {PLATFORM}"))
    assert "50 of 50" in write(load())
    (study / "params.yaml").write_text(text.replace("platform: null", "platform: mars"))
    with pytest.raises(UserError, match="benchmark.platform is 'mars'.*other_gpu, test_cpu"):
        write(load())


def test_stage_script_reports_without_torch_and_without_traceback(study):
    folder, script = study / "reports" / "default", str(ROOT / "pipeline" / "report.py")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code = f"import runpy, sys; runpy.run_path({script!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'pipeline')!r}); {code}"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    shutil.rmtree(study / "reports/default/cells")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: reports/default/cells/")
    assert "Traceback" not in done.stderr

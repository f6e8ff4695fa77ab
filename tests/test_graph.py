"""dvc.yaml: complete dependencies, and nothing runs again without need."""

import os
import shlex
import sys

import pytest
import yaml

import _graph
import repro
from clones import ROOT, chdir
from closure import METHODS, closure, imported, method_files, of_stage
from hobs_rspar import config

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
CELLS = ("allocate", "prune", "finetune", "benchmark")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_says_what_it_does(stage):
    assert len(STAGES[stage].get("desc", "")) > 20


@pytest.mark.parametrize("stage", STAGES)
def test_stage_depends_on_exactly_what_its_script_imports(stage):
    listed = {name for name in STAGES[stage]["deps"] if name.startswith(("src/", "pipeline/", "benchmarks/"))}
    listed -= {"src/hobs_rspar/methods/${item.method}.py", "benchmarks/${item.experiment}.py"}
    needed = {str(path.relative_to(ROOT)) for path in of_stage(stage)}
    assert sorted(needed - listed) == [], "imported, but not in deps: an edit of these would not rerun the stage"
    assert sorted(listed - needed) == [], "in deps, but not imported: an edit of these would rerun it for nothing"


def test_experiments_that_run_alone_exist():
    """Under another name, one would be timed beside what runs side by side."""
    assert set(_graph.TIMED) < {*config.CLAIMS, *config.EXPERIMENTS}


def test_allocate_depends_on_its_own_method_only():
    methods = [name for name in STAGES["allocate"]["deps"] if "/methods/" in name and "/_" not in name]
    assert methods == ["src/hobs_rspar/methods/${item.method}.py"]
    assert "methods.${item.method}" in STAGES["allocate"]["params"] and "methods" not in STAGES["allocate"]["params"]


@pytest.mark.parametrize("method", method_files(), ids=lambda path: path.stem)
def test_method_does_not_import_another(method):
    others = [path.name for path in imported(method) if path in method_files()]
    assert not others, "an edit of these would change this method, but DVC could not know"


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_a_stage_reads_has_a_producer(stage):
    """Everything in data/ and artifacts/ that a stage depends on is the output of another one."""
    outs = {name if isinstance(name, str) else next(iter(name)) for entry in STAGES.values()
            for name in entry["outs"] + entry.get("metrics", []) + entry.get("plots", [])}
    reads = {name for name in STAGES[stage]["deps"] if name.startswith(("data/", "artifacts/"))}
    of_cells = {name.replace("${item.method}-${item.seed}", "${item.cell}") for name in outs}
    assert reads <= outs | of_cells


@pytest.mark.parametrize("stage", ["report", "data"])
def test_stage_without_networks_does_not_need_torch_pruning(stage):
    assert not [path for path in of_stage(stage) if "torch_pruning" in path.read_text()]


def test_report_imports_no_torch(toy):
    """Run for real: a report costs no second of importing torch."""
    check = "import runpy, sys; sys.path.insert(0, 'pipeline'); runpy.run_path('pipeline/report.py'); " \
            "sys.exit(' '.join(name for name in ('torch', 'torchvision') if name in sys.modules) or 0)"
    toy.run(f"{shlex.quote(sys.executable)} -c {shlex.quote(check)}")


def test_closure_follows_functions_and_packages():
    files = {path.name for path in closure(ROOT / "pipeline" / "prune.py")}
    assert {"prune.py", "_stage.py", "errors.py", "slicing.py"} <= files
    assert "trace.py" not in files  # an edit of the trace makes no cell stale that has its plan
    assert "__init__.py" not in files


# What reruns after a change: the real dvc.yaml with stubs for scripts. Every test leaves the copy as it was.

@pytest.fixture()
def graph(stubbed):
    yield stubbed
    stubbed.run("git checkout --quiet -- .")


def test_tests_that_share_a_run_share_a_process(stubbed, request):
    """Without marks that pytest-xdist reads, every process would run the fixture's study."""
    name, worker = request.node.nodeid, os.environ.get("PYTEST_XDIST_WORKER")
    assert worker is None or name.endswith("@stubbed")


def test_second_run_does_nothing(graph):
    assert graph.stale() == set()


CLAIMS = {f"claim@{name}" for name in yaml.safe_load((ROOT / "configs/default.yaml").read_text())["study"]["claims"]}


def cells(*stages, method=""):
    return {f"{stage}@{name}-{seed}" for stage in stages for seed in (1, 2)
            for name in ([method] if method else ["l1", "hobs_rspar"])}


def test_edit_of_a_method_reruns_its_cells_only(graph):
    graph.write("src/hobs_rspar/methods/l1.py", graph.read("src/hobs_rspar/methods/l1.py") + "\n# edited\n")
    assert graph.stale() == cells("allocate", method="l1")


def test_option_of_a_method_reruns_its_cells_only(graph):
    graph.set_params(**{"methods.hobs_rspar.iterations": 5})
    assert graph.stale() == cells("allocate", method="hobs_rspar") | CLAIMS


def test_new_claim_runs_no_cell(graph):
    """And one that is dropped makes nothing but the report stale."""
    claims = [name.partition("@")[2] for name in sorted(CLAIMS)]
    graph.set_params(**{"study.experiments": ["predictors"]})
    assert graph.stale() == {"experiment@predictors", "report"}
    graph.set_params(**{"study.experiments": [], "study.claims": claims[1:]})
    assert graph.stale() == {"report"}


def test_claims_run_beside_cells(graph):
    """They need a core each, and nothing that the stages before and after the cells write."""
    with chdir(graph.path):
        read = _graph.read()
        before, after = repro.phases(read)
        pooled = repro.patterns(read, set(read.order))
    assert not CLAIMS & {*before, *after} and CLAIMS <= set(pooled)
    assert "sensitivity" in before and set(after) == cells("benchmark") | {"report"}


@pytest.mark.parametrize(("key", "value", "first"), [
    ("finetune.epochs", 7, {"finetune", "report"}),
    ("prune.ridge", 0.5, {"prune"}),
    ("study.budget.macs", 0.4, {"latency", "allocate", "claim", "report"}),
    ("benchmark.seconds", 0.7, {"benchmark"}),
    ("report.resamples", 77, {"report"}),
    ("sensitivity.damping", 0.7, {"sensitivity", "claim"}),
    ("finetune.curve", [5000], {"finetune", "report"}),
    ("pretrain.epochs", 3, {"pretrain"}),
    ("study.margin_points", 0.3, {"report"}),
])
def test_param_reruns_only_what_reads_it(graph, key, value, first):
    """Stages before the changed one stay; those after it follow when its output differs."""
    graph.set_params(**{key: value})
    named = {"claim": CLAIMS} | {stage: cells(stage) for stage in CELLS}
    assert graph.stale() == {name for stage in first for name in named.get(stage, {stage})}


def test_an_edited_method_goes_all_the_way_to_the_report(graph):
    graph.write("src/hobs_rspar/methods/l1.py", graph.read("src/hobs_rspar/methods/l1.py") + "\n# edited\n")
    before = graph.locked()
    graph.run("dvc repro")
    changed = {stage for stage, entry in graph.locked().items() if entry != before[stage]}
    graph.run("git checkout --quiet -- . && dvc checkout --quiet")
    assert changed == cells(*CELLS, method="l1") | {"report"}


def test_new_seed_reruns_no_finished_cell(graph):
    graph.set_params(**{"study.seeds": [1, 2, 3]})
    assert graph.stale() == {f"{stage}@{method}-3" for stage in CELLS for method in ("l1", "hobs_rspar")} \
        | {"report"}


def test_methods_have_a_file_each():
    assert (METHODS / "_protocol.py").is_file() and len(method_files()) >= 10

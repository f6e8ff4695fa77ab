"""CONTRIBUTING.md, followed literally: a new method from its text runs, and nothing else does."""

import json
import re

import pytest
import yaml

from clones import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def block(language: str) -> str:
    """The one code block of a language."""
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) >= 1
    return found[0]


@pytest.fixture()
def added(micro):
    """The micro study with the method that the text adds."""
    path = re.search(r"`(src/hobs_rspar/methods/\w+\.py)`:", TEXT)[1]
    micro.write(path, block("python"))
    addition = yaml.safe_load(block("yaml"))
    params = yaml.safe_load(micro.read("params.yaml"))
    params["study"]["methods"] += addition["study"]["methods"]
    params["methods"] |= addition["methods"]
    micro.write("params.yaml", yaml.safe_dump(params, sort_keys=False))
    yield micro, path.split("/")[-1].removesuffix(".py")
    micro.run("git checkout --quiet -- . && git clean --quiet -d --force src reports")


def test_new_method_runs_and_only_it(added):
    clone, method = added
    cell = f"{method}-7"
    stages = {f"{stage}@{cell}" for stage in ("allocate", "prune", "finetune", "benchmark")}
    assert clone.stale() == stages | {"report"}
    out = clone.run(f"dvc repro -s allocate@{cell} prune@{cell}")
    assert f"allocate {cell}: kept" in out and f"prune {cell}: " in out and "l1-7" not in out
    plan = json.loads(clone.read(f"artifacts/micro/cells/{cell}/plan.json"))
    assert abs(plan["macs_ratio"] - 0.6) <= 0.01 * 0.6 and plan["method"] == method


def test_commands_in_the_text_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)", TEXT)) | {block("bash").split()[1]} <= targets
    for script in re.findall(r"`python (\S+\.py)", TEXT):
        assert (ROOT / script).is_file()


def test_a_mistake_in_the_new_block_is_named(added):
    clone, method = added
    clone.set_params(**{f"methods.{method}": {"powr": 2}})
    out = clone.run(f"python pipeline/allocate.py {method} 7", ok=False)
    assert out.startswith("error: ") and f"methods.{method}" in out and "powr" in out and "Traceback" not in out

"""Documentation that is executed, and documentation that is generated."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_every_example_of_the_api_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks, names = code_blocks("docs/API.md"), {}
    assert len(blocks) >= 10
    for block in blocks:
        exec(compile(block, "docs/API.md", "exec"), names)


def test_every_public_name_is_on_the_api_page():
    import hobs_rspar

    page = (ROOT / "docs/API.md").read_text()
    assert [name for name in hobs_rspar.__all__ if name not in page and name != "PruningPlan"] == []


def test_the_readme_example_runs_on_a_users_model():
    from hobs_rspar.networks import NetworkSpec, build

    images, labels = torch.randn(192, 1, 28, 28), torch.randint(10, (192,))
    names = {"model": build(NetworkSpec("resnet8", 10, 1, 28)), "images": images,
             "loader": DataLoader(TensorDataset(images, labels), batch_size=64)}
    block = code_blocks("README.md")[0]
    assert len(block.strip().splitlines()) <= 10
    exec(compile(block.replace("protect=", "iterations=1, episodes=2, protect="), "README.md", "exec"), names)
    assert abs(names["report"]["macs_ratio"] - 0.5) < 0.005


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    assert [target for target in targets if "://" not in target and not (ROOT / page).parent.joinpath(target).exists()
            ] == []


def test_files_that_the_page_on_the_search_names_exist():
    text = (ROOT / "docs/search.md").read_text()
    files = set(re.findall(r"`?(?:python )?((?:benchmarks|allocation|methods)/\w+\.py)", text))
    assert len(files) >= 8
    assert files == {name for name in files for base in (ROOT, ROOT / "src/hobs_rspar") if (base / name).is_file()}
    params = yaml.safe_load((ROOT / "configs/default.yaml").read_text())
    for study in re.findall(r"STUDY=(\w+)", text):
        assert (ROOT / f"configs/{study}.yaml").is_file()
    assert set(re.findall(r"claim@(\w+)", text)) <= set(params["study"]["claims"])
    options = params["methods"]["hobs_rspar"]
    assert {"first", "rounds", "measured", "iterations", "episodes", "images"} <= set(re.findall(r"`(\w+)`", text)) & \
        set(options)


@pytest.mark.parametrize("task", ["methods_page", "plots_page"])
def test_a_generated_page_is_up_to_date(task):
    """docs/methods.md is what the docstrings say, and DVC's page has the renderer that is installed."""
    done = subprocess.run([sys.executable, f"tasks/{task}.py", "--check"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_tables_are_what_the_reports_say():
    from hobs_rspar.evidence import readme

    text = (ROOT / "README.md").read_text()
    studies = re.findall(r"<!-- (\w+):begin -->", text)
    assert studies[0] == "default"
    for study in studies:
        report = ROOT / "reports" / study
        if not (report / "tables/T1.csv").exists():
            pytest.skip(f"the study '{study}' has not been run")
        assert readme.render(report) in text, study

"""Writes docs/methods.md from the methods' docstrings and tuning trials; ``--check`` only compares."""

import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
METHODS = ROOT / "src" / "hobs_rspar" / "methods"
MASKED = ROOT / "src" / "hobs_rspar" / "adaprune.py"
HEADER = """# Methods

Generated from the docstrings of `src/hobs_rspar/methods/` by `python tasks/methods_page.py`. All methods get the same
dense checkpoint, the same kept MACs (within 1 %), the same recovery and the same evaluation. No method has been tuned
on test data or on the study's seeds; their options are the published defaults unless params.yaml says otherwise.
Methods with constants to tune get the same number of trials (`python benchmarks/tuning.py METHOD`, on validation images
and seeds of development); where they were run, they are listed, and params.yaml has the values of the best one.
`hobs_rspar` was developed on such images and seeds beyond its trials, as a new method is; its search is longer than
its best trial's ([search.md](search.md) says why).
"""


def page() -> str:
    parts = [HEADER]
    for path in sorted(METHODS.glob("[!_]*.py")):
        parts.append(f"## `{path.stem}`\n\n{ast.get_docstring(ast.parse(path.read_text()))}\n")
        parts += [trials(json.loads(file.read_text()))
                  for file in sorted(ROOT.glob(f"reports/*/tuning/{path.stem}.json"))]
    parts.append(f"## Masked sparsity: `adaprune`\n\n{ast.get_docstring(ast.parse(MASKED.read_text()))}\n")
    return "\n".join(parts)


def trials(record: dict) -> str:
    """The trials of a method as a table, the best first."""
    names, seeds = list(record["trials"][0]["constants"]), record["seeds"]
    budget = ", ".join(f"{key} {value:g}" for key, value in record["budget"].items())
    lines = [f"Tuning trials, validation top-1 (%) after recovery: {record['network']} on {record['dataset']}, "
             f"study.budget: {budget}. The first trial has the values that params.yaml had.\n",
             f"| Trial | {' | '.join(f'`{name}`' for name in names)} | {' | '.join(f'seed {seed}' for seed in seeds)} "
             "| mean |", f"|{' ---: |' * (len(names) + len(seeds) + 2)}"]
    rows = [(sum(trial["top1_validation"]) / len(seeds), number, trial)
            for number, trial in enumerate(record["trials"], 1)]
    for mean, number, trial in sorted(rows, key=lambda row: -row[0]):
        values = [f"{value:g}" for value in trial["constants"].values()]
        top1 = [f"{value:.2f}" for value in trial["top1_validation"]]
        lines.append(f"| {' | '.join([str(number), *values, *top1])} | {mean:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit("error: docs/methods.md is not what the docstrings say; run 'python tasks/methods_page.py'")


if __name__ == "__main__":
    main()

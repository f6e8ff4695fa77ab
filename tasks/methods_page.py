"""Writes docs/methods.md from the methods' docstrings; ``--check`` only compares."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
METHODS = ROOT / "src" / "hobs_rspar" / "methods"
HEADER = """# Methods

Generated from the docstrings of `src/hobs_rspar/methods/` by `python tasks/methods_page.py`. All methods get the same
dense checkpoint, the same kept MACs (within 1 %), the same recovery and the same evaluation. No method has been tuned
on test data or on the study's seeds; their options are the published defaults unless params.yaml says otherwise.
"""


def page() -> str:
    parts = [HEADER]
    for path in sorted(METHODS.glob("[!_]*.py")):
        parts.append(f"## `{path.stem}`\n\n{ast.get_docstring(ast.parse(path.read_text()))}\n")
    return "\n".join(parts)


def main() -> None:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit("error: docs/methods.md is not what the docstrings say; run 'python tasks/methods_page.py'")


if __name__ == "__main__":
    main()

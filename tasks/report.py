"""Renders a study's report from its records: ``python tasks/report.py NAME``.

It takes seconds and needs no torch; params.yaml and dvc.lock stay as they are.
In Git are every study's records and tables, and the page and figures of the default study: those of the others are
made by this command, or by their own ``make repro``.
"""

from __future__ import annotations

import sys

import study
from _task import FOLDER, run
from hobs_rspar import config
from hobs_rspar.evidence import report


def main() -> None:
    overlay = study.studied(sys.argv[1:], "make report STUDY=pareto")
    text = study.composed(overlay)
    study.validate(overlay, text)
    composed = FOLDER / f"report-{overlay.stem}.yaml"
    composed.write_text(text)
    try:
        print(report.write(config.load(composed)))
    finally:
        composed.unlink()


if __name__ == "__main__":
    run(main)

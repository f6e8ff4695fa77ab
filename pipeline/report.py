"""Report: reads the cells that params name and writes metrics, tables, figures and the page (no torch)."""

from _stage import run
from hobs_rspar.config import load
from hobs_rspar.evidence.report import write


def main() -> None:
    print(write(load()))


if __name__ == "__main__":
    run(main)

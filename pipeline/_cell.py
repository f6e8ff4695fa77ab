"""What the stages of single cells share that are named by the cell, such as hobs_rspar-42: export and speed."""

import sys
from pathlib import Path

import _stage  # noqa: F401  (it makes the package importable)
from hobs_rspar import config
from hobs_rspar.errors import UserError, did_you_mean
from hobs_rspar.hardware.record import CellFiles
from hobs_rspar.paths import Paths


def named_cell(params: config.Params) -> CellFiles:
    """The files of the cell on the command line.

    Raises:
        UserError: there is none, or the study has no such cell.
    """
    cell = sys.argv[1] if len(sys.argv) == 2 else ""
    if cell not in params.cells:
        raise UserError(f"usage: python pipeline/{Path(sys.argv[0]).name} CELL.{did_you_mean(cell, params.cells)} "
                        f"Cells of this study: {', '.join(params.cells)}")
    method, _, seed = cell.rpartition("-")
    return CellFiles(Paths.of(params.study), method, int(seed))

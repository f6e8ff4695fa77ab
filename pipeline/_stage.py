"""What every stage script shares: this checkout's package first on the path, and errors without a traceback.

Queued experiments run in temporary copies of the repository; an installed package would make them run the main
workspace's code, so the path is set here instead.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from hobs_rspar.errors import UserError, did_you_mean  # noqa: E402  (the line above makes it importable)


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; a UserError becomes one line on stderr and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def cell_arguments(params) -> tuple[str, int]:
    """Method and seed from the command line: ``python pipeline/<stage>.py METHOD SEED``.

    Raises:
        UserError: they are missing, or the method has no block in params.yaml.
    """
    stage = Path(sys.argv[0]).stem
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        raise UserError(f"usage: python pipeline/{stage}.py METHOD SEED, for example: python pipeline/{stage}.py "
                        f"{params.study.methods[-1]} {params.study.seeds[0]}")
    method = sys.argv[1]
    if method not in params.methods:
        raise UserError(f"method '{method}' has no block in params.yaml.{did_you_mean(method, params.methods)} "
                        f"Methods there: {', '.join(params.methods)}")
    return method, int(sys.argv[2])


def record_seconds(path: Path, started: float) -> float:
    """Writes the wall time since ``started`` beside the outputs, never into one: it differs every run."""
    seconds = time.perf_counter() - started
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": round(seconds, 2)}) + "\n")
    return seconds

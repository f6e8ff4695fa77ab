"""Records of claims that experiments outside the graph of stages measured: ``reports/<study>/claims/<claim>.json``."""

from __future__ import annotations

import json
from pathlib import Path


def write(path: Path, record: dict) -> None:
    """Writes one claim's record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")

"""Stand-in until the shared helper is merged: writes one claim's record as JSON."""

import json
from pathlib import Path


def write(path, record: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

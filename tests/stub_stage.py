"""Stands in for every script of a stage in tests of the graph: writes a digest of what the stage reads, at once."""

import hashlib
import sys
import time
from pathlib import Path

import yaml

SCRIPT = Path(sys.argv[0])
PARAMS = yaml.safe_load(Path("params.yaml").read_text())
STAGE = SCRIPT.stem
if SCRIPT.parent.name == "benchmarks":
    STAGE = "claim" if SCRIPT.stem in PARAMS["study"]["claims"] else "experiment"


def filled(name: str) -> Path:
    """The path of an entry of dvc.yaml with this study's and this cell's names filled in."""
    values = {f"study.{key}": PARAMS["study"][key] for key in ("name", "dataset", "network")}
    values.update(zip(("item.method", "item.seed"), sys.argv[1:]))
    values |= {"item.experiment": SCRIPT.stem, "item.cell": "-".join(sys.argv[1:])}
    for key, value in values.items():
        name = name.replace("${" + key + "}", str(value))
    return Path(name)


def content(path: Path) -> bytes:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return b"".join(file.read_bytes() for file in files if file.is_file())


def main() -> None:
    stage = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][STAGE]
    cell = SCRIPT.stem if STAGE in ("claim", "experiment") else "-".join(sys.argv[1:])
    trap = Path(f"trap-{STAGE}-{cell}")
    if trap.exists():
        seconds = float(trap.read_text() or 0)
        print(f"{STAGE} {cell}: trapped", flush=True)
        time.sleep(seconds)
        sys.exit(f"error: {STAGE} {cell} was told to fail")
    digest = hashlib.sha256(b"".join(content(filled(name)) for name in stage["deps"]))
    for entry in stage["outs"] + stage.get("metrics", []) + stage.get("plots", []):
        write(filled(entry if isinstance(entry, str) else next(iter(entry))), digest)
    if STAGE == "benchmark":  # its timings are not an output of DVC's, but the report reads them
        write(Path("reports") / PARAMS["study"]["name"] / "platforms" / "stub" / f"{cell}.json", digest)
    print(f"{STAGE} {cell}: stub -> here")


def write(out: Path, digest) -> None:
    text = digest.hexdigest() + out.name
    file = out if out.suffix else out / "content"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('{"value": 1}' if out.suffix == ".json" and "metrics" in out.name else text)


if __name__ == "__main__":
    main()

"""Switches the checkout to a study: ``python tasks/study.py NAME``, or ``path/to/NAME.yaml`` for a file anywhere.

params.yaml becomes configs/default.yaml with what configs/NAME.yaml says instead: sections are merged key by key, a
list replaces a list, comments stay (an overlay's own comment replaces the default's). An overlay with a line
``extends: OTHER`` comes after configs/OTHER.yaml. The dvc.lock of the study that is left is kept in its reports folder,
that of the new one comes back from there, so that nothing finished runs again.
"""

from __future__ import annotations

import io
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from _task import FOLDER, STARTED_IN, check_options, only_one, run
from hobs_rspar import config
from hobs_rspar.errors import UserError, did_you_mean

CONFIGS, PARAMS, LOCK = Path("configs"), Path("params.yaml"), Path("dvc.lock")
SHARED_STAGES = ("data", "pretrain", "sensitivity")
WRITTEN = "# Written by 'make study STUDY={}' from configs/default.yaml and {}.\n"


def main() -> None:
    overlay = studied(sys.argv[1:])
    name = overlay.stem
    with only_one(f"make study STUDY={name}"):
        text = composed(overlay)
        validate(overlay, text)
        before = current_study()
        keep_edits(before)
        swap_lock(before, name)
        PARAMS.write_text(text)
        keep_claims_folder(name)
    print(f"params.yaml is the study '{name}' ({overlay}); 'make preview' shows it, 'make repro' runs it")


def keep_claims_folder(name: str) -> None:
    """The report depends on the folder, and no experiment makes it where the study has none; Git keeps it."""
    study = config.load(PARAMS).study
    if not study.claims + study.experiments:
        folder = Path("reports") / name / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitkeep").touch()


def studied(arguments: list[str], usage: str = "make study STUDY=toy") -> Path:
    """The overlay of the study on the command line.

    Raises:
        UserError: there is none, no such file in configs/ or elsewhere, or its name is that of another study.
    """
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if len(arguments) != 1:
        raise UserError(f"say which study: {usage}. Studies: {', '.join(names)}")
    asked = arguments[0]
    if asked.endswith(".yaml"):
        return _own(STARTED_IN / asked, names)
    if asked not in names:
        raise UserError(f"there is no study '{asked}'.{did_you_mean(asked, names)} Studies: {', '.join(names)}; a new "
                        f"one is a file configs/{asked}.yaml, or {asked}.yaml anywhere and STUDY=path/to/{asked}.yaml, "
                        "with the keys that differ from configs/default.yaml")
    return CONFIGS / f"{asked}.yaml"


def _own(file: Path, names: list[str]) -> Path:
    """A file outside of configs/, whose name is its study's."""
    known = CONFIGS / file.name
    if not file.is_file():
        raise UserError(f"{file} not found; STUDY=path/to/mine.yaml names a file with the keys that differ from "
                        "configs/default.yaml")
    if file.stem in names and file.resolve() != known.resolve():
        raise UserError(f"{file} would be the study '{file.stem}', which {known} is already; its name is that of its "
                        "results, so rename the file")
    return known if file.stem in names else file


def composed(overlay: Path) -> str:
    """The text of params.yaml for a study."""
    default = CONFIGS / "default.yaml"
    if overlay == default:
        return default.read_text()
    reader = round_trip()
    base = reader.load(default.read_text())
    for part in overlays(overlay, reader):
        merge(base, part)
    base["study"]["name"] = overlay.stem
    base.ca.comment = None
    text = io.StringIO()
    reader.dump(base, text)
    about = takewhile(lambda line: line.startswith("#"), overlay.read_text().splitlines(keepends=True))
    asked = overlay.stem if overlay.parent == CONFIGS else overlay
    return "".join(about) + WRITTEN.format(asked, overlay) + text.getvalue()


def overlays(overlay: Path, reader: YAML) -> list[CommentedMap]:
    """The overlay of a study, after those that it extends.

    Raises:
        UserError: one has no sections, extends itself, or a study that is not there.
    """
    found: dict[Path, CommentedMap] = {}
    while overlay != CONFIGS / "default.yaml":
        if overlay in found:
            raise UserError(f"{overlay} extends itself; 'extends' must name another study")
        part = reader.load(overlay.read_text())
        if not isinstance(part, CommentedMap):
            raise UserError(f"{overlay} must hold sections of params.yaml, such as 'study:' with keys under it")
        found[overlay] = part
        overlay = studied([str(part.pop("extends", None) or "default")])
    return list(found.values())[::-1]


def round_trip() -> YAML:
    """A reader and writer that keeps comments and writes in the style of configs/default.yaml."""
    yaml_ = YAML()
    yaml_.indent(mapping=2, sequence=4, offset=2)
    yaml_.width = 120
    yaml_.preserve_quotes = True
    yaml_.representer.add_representer(type(None), lambda it, _: it.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml_


def merge(base: CommentedMap, overlay: CommentedMap) -> None:
    """Takes over every key of the overlay; sections are merged, everything else is replaced."""
    for key, value in overlay.items():
        if isinstance(value, CommentedMap) and isinstance(base.get(key), CommentedMap) and value:
            merge(base[key], value)
            continue
        base[key] = value
        if key in overlay.ca.items:
            base.ca.items[key] = overlay.ca.items[key]


def validate(overlay: Path, text: str) -> None:
    """Raises the error of the params that would be written, before they are."""
    FOLDER.mkdir(exist_ok=True)
    candidate = FOLDER / "candidate.yaml"
    candidate.write_text(text)
    try:
        check_options(config.load(candidate))
    except UserError as error:
        message = str(error).replace(str(candidate), str(overlay)).replace("params.yaml", str(overlay))
        raise UserError(message) from None
    finally:
        candidate.unlink()


def current_study() -> str | None:
    """The name in params.yaml; None where that file is missing or broken: then there is nothing to keep."""
    try:
        return yaml.safe_load(PARAMS.read_text())["study"]["name"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def keep_edits(before: str | None) -> None:
    """Copies a params.yaml that was edited by hand aside, before it is overwritten."""
    if before is None:
        return
    written = re.search(WRITTEN.format(".+", "(.+)"), PARAMS.read_text())
    overlay = Path(written[1]) if written else CONFIGS / f"{before}.yaml"
    edited = differences(yaml.safe_load(composed(overlay)) if overlay.exists() else {},
                         yaml.safe_load(PARAMS.read_text()))
    if edited:
        kept = FOLDER / f"params-{before}.yaml"
        kept.write_text(PARAMS.read_text())
        print(f"params.yaml had your edits ({', '.join(list(edited)[:5])}); they are kept in {kept}")


def differences(a: Any, b: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted names of the keys whose values differ, with both values; None where a side has no such key."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return {} if a == b else {key: (a, b)}
    names = dict.fromkeys([*a, *b])
    return {found: values for name in names
            for found, values in differences(a.get(name), b.get(name), f"{key}.{name}".lstrip(".")).items()}


def swap_lock(before: str | None, name: str) -> None:
    """Keeps the old study's dvc.lock and brings back the new one's.

    The entries of the stages that studies share stay as they are, where both studies share them: they tell of the files
    that are here now. DVC itself finds out whether they fit.
    """
    if before == name:
        return
    if before and LOCK.exists():
        kept = Path("reports") / before / "dvc.lock"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(LOCK.read_bytes())
    saved = Path("reports") / name / "dvc.lock"
    reader = YAML(typ="safe")  # libyaml's, twenty times faster than the usual loader
    now, then = (reader.load(path.read_text()) if path.exists() else {} for path in (LOCK, saved))
    stages = dict(then.get("stages", {}))
    for stage in SHARED_STAGES:
        entry = now.get("stages", {}).get(stage)
        if entry and (stage not in stages or outputs(stages[stage]) == outputs(entry)):
            stages[stage] = entry
    if now or then:
        from _dvc import as_dvc_writes  # imports DVC; a wrong name should be told at once

        LOCK.write_text(as_dvc_writes({**now, **then, "stages": stages}))


def outputs(entry: dict) -> list[str]:
    """Paths that a stage wrote, by its entry in a dvc.lock."""
    return [out["path"] for out in entry["outs"]]


if __name__ == "__main__":
    run(main)

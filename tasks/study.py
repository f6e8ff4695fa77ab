"""Switches the checkout to a study: ``python tasks/study.py NAME``.

params.yaml becomes configs/default.yaml with what configs/NAME.yaml says instead: sections are merged key by key, a
list replaces a list, comments stay (an overlay's own comment replaces the default's). An overlay with a line
``extends: OTHER`` comes after configs/OTHER.yaml. The dvc.lock of the study that
is left is kept in its reports folder, that of the new one comes back from there, so that nothing finished runs again.
"""

from __future__ import annotations

import io
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from _task import FOLDER, check_options, only_one, run
from hobs_rspar import config
from hobs_rspar.errors import UserError, did_you_mean

CONFIGS, PARAMS, LOCK = Path("configs"), Path("params.yaml"), Path("dvc.lock")
SHARED_STAGES = ("data", "pretrain", "sensitivity")


def main() -> None:
    name = studied(sys.argv[1:])
    with only_one(f"make study STUDY={name}"):
        text = composed(name)
        validate(name, text)
        before = current_study()
        keep_edits(before)
        swap_lock(before, name)
        PARAMS.write_text(text)
        keep_claims_folder(name)
    print(f"params.yaml is the study '{name}' (configs/{name}.yaml); 'make preview' shows it, 'make repro' runs it")


def keep_claims_folder(name: str) -> None:
    """The report depends on the folder, and no experiment makes it where the study has none; Git keeps it."""
    study = config.load(PARAMS).study
    if not study.claims + study.experiments:
        folder = Path("reports") / name / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitkeep").touch()


def studied(arguments: list[str], usage: str = "make study STUDY=toy") -> str:
    """The study's name on the command line.

    Raises:
        UserError: there is none, or no such file in configs/.
    """
    names = sorted(file.stem for file in CONFIGS.glob("*.yaml"))
    if len(arguments) != 1:
        raise UserError(f"say which study: make study STUDY=toy. Studies: {', '.join(names)}")
    if arguments[0] not in names:
        raise UserError(f"there is no study '{arguments[0]}'.{did_you_mean(arguments[0], names)} Studies: "
                        f"{', '.join(names)}; a new one is a file configs/{arguments[0]}.yaml with the keys that "
                        "differ from configs/default.yaml")
    return arguments[0]


def composed(name: str) -> str:
    """The text of params.yaml for a study."""
    default = CONFIGS / "default.yaml"
    if name == "default":
        return default.read_text()
    reader, overlay_text = round_trip(), (CONFIGS / f"{name}.yaml").read_text()
    base = reader.load(default.read_text())
    for overlay in overlays(name, reader):
        merge(base, overlay)
    base["study"]["name"] = name
    base.ca.comment = None
    text = io.StringIO()
    reader.dump(base, text)
    about = "".join(takewhile(lambda line: line.startswith("#"), overlay_text.splitlines(keepends=True)))
    origin = f"# Written by 'make study STUDY={name}' from configs/default.yaml and configs/{name}.yaml.\n"
    return about + origin + text.getvalue()


def overlays(name: str, reader: YAML) -> list[CommentedMap]:
    """The overlay of a study, after those that it extends.

    Raises:
        UserError: one has no sections, extends itself, or a study that is not there.
    """
    found: dict[str, CommentedMap] = {}
    while name != "default" and name is not None:
        if name in found:
            raise UserError(f"configs/{name}.yaml extends itself; 'extends' must name another study")
        overlay = reader.load((CONFIGS / f"{studied([name])}.yaml").read_text())
        if not isinstance(overlay, CommentedMap):
            raise UserError(f"configs/{name}.yaml must hold sections of params.yaml, such as 'study:' with keys under "
                            "it")
        found[name] = overlay
        name = overlay.pop("extends", None)
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


def validate(name: str, text: str) -> None:
    """Raises the error of the params that would be written, before they are."""
    candidate = FOLDER / "candidate.yaml"
    candidate.write_text(text)
    try:
        check_options(config.load(candidate))
    except UserError as error:
        mine = f"configs/{name}.yaml"
        message = str(error).replace(str(candidate), mine).replace("params.yaml", mine)
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
    edited = differences(yaml.safe_load(composed(before)) if (CONFIGS / f"{before}.yaml").exists() else {},
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

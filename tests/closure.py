"""The static import closure of a stage script: which files of this repository it can come to execute."""

from __future__ import annotations

import ast
from pathlib import Path

from clones import ROOT
from hobs_rspar.config import CLAIMS, EXPERIMENTS

PACKAGE = "hobs_rspar"
SOURCE = ROOT / "src"
METHODS = SOURCE / PACKAGE / "methods"


def closure(*roots: Path, without: frozenset[Path] = frozenset()) -> set[Path]:
    """The files and everything of this repository that they import, inside functions too.

    Package ``__init__`` files are lazy and say nothing about a stage: they are left out.

    Args:
        roots: where to begin; part of the result.
        without: files that are neither followed nor counted.
    """
    found: set[Path] = set()
    waiting = list(roots)
    while waiting:
        file = waiting.pop()
        if file not in found | without:
            found.add(file)
            waiting += imported(file)
    return found


def imported(file: Path) -> list[Path]:
    """Files of this repository that one file imports."""
    names = [name for node in ast.walk(without_type_checking(ast.parse(file.read_text())))
             for name in modules(node, file)]
    return [path for path in (located(name, file) for name in names) if path is not None and path != file]


def without_type_checking(tree: ast.Module) -> ast.Module:
    """What stands under ``if TYPE_CHECKING`` is never executed."""
    tree.body = [node for node in tree.body
                 if not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")]
    return tree


def modules(node: ast.AST, file: Path) -> list[str]:
    """Dotted names that an import statement may load: ``from a import b`` is ``a`` and perhaps the module ``a.b``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = file.relative_to(SOURCE).parts[:-node.level]
        base = ".".join([*package, *filter(None, [node.module])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def located(name: str, importer: Path) -> Path | None:
    """The file of a module of this repository; None for packages and for everybody else's modules.

    Scripts find modules beside them, and those of benchmarks/ may add pipeline/ to the path.
    """
    inside = (SOURCE / Path(*name.split("."))).with_suffix(".py")
    if name.split(".")[0] == PACKAGE:
        return inside if inside.is_file() else None
    folders = [] if SOURCE in importer.parents or "." in name else [importer.parent, ROOT / "pipeline"]
    return next((path for folder in folders if (path := folder / f"{name}.py").is_file()), None)


def method_files() -> list[Path]:
    return sorted(METHODS.glob("[!_]*.py"))


def of_stage(stage: str) -> set[Path]:
    """Which files a stage of dvc.yaml depends on; of the methods, those files that they share.

    The registry imports one method by name: ``allocate`` depends on its own method's file (``${item.method}``) and on
    what any method may import. ``claim`` depends on its own script (``${item.experiment}``), on what any of them
    imports, and on the methods that any of them runs; so does ``experiment``.
    """
    if names := {"claim": CLAIMS, "experiment": EXPERIMENTS}.get(stage):
        scripts = {ROOT / "benchmarks" / f"{name}.py" for name in names}
        return closure(*scripts, *methods_run_by(scripts)) - scripts
    script = ROOT / "pipeline" / f"{stage}.py"
    methods = frozenset(method_files())
    files = closure(script, without=methods)
    if stage == "allocate":
        files |= closure(*(path for method in methods for path in imported(method)), without=methods)
    return files | read_by(files)


def methods_run_by(scripts: set[Path]) -> set[Path]:
    """The methods that experiments on single networks name: those are imported by name."""
    text = "".join(script.read_text() for script in scripts if "from _bench import" in script.read_text())
    return {file for file in method_files() if f'"{file.stem}"' in text}


def read_by(files: set[Path]) -> set[Path]:
    """Files of the package that are no code (templates) and that one of these files names."""
    others = [path for path in (SOURCE / PACKAGE).rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    return {path for path in others if any(path.name in file.read_text() for file in files)}

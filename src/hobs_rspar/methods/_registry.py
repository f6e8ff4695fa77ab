"""Methods by name: a method is imported only when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from hobs_rspar.config import available_methods
from hobs_rspar.errors import UserError, did_you_mean


def method(name: str) -> ModuleType:
    """The module of a method.

    Raises:
        UserError: there is no such file.
    """
    names = available_methods()
    if name not in names:
        raise UserError(f"method '{name}' is not known.{did_you_mean(name, names)} Methods: {', '.join(names)}; a new "
                        "one is a file in src/hobs_rspar/methods/ (see CONTRIBUTING.md)")
    return importlib.import_module(f"hobs_rspar.methods.{name}")


def options(name: str, block: dict[str, Any], source: str = "params.yaml: methods."):
    """A method's validated options.

    Args:
        name: of the method.
        block: ``params.methods[name]``; missing keys take the defaults.
        source: where the block stands, for messages.

    Raises:
        UserError: an unknown key, or a value of the wrong type or out of range.
    """
    kind = method(name).Options
    try:
        return kind.model_validate(block)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = sorted(kind.model_fields)
        hint = did_you_mean(key, allowed) if first["type"] == "extra_forbidden" else f" (seen: {first['input']!r})"
        raise UserError(f"{source}{name}.{key}: {first['msg']}.{hint} Options: "
                        f"{', '.join(allowed) or 'none'}") from None

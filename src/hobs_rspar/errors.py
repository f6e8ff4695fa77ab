"""The one exception whose message is meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file or key, the value seen, what is allowed and the next step."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest allowed word, or an empty string."""
    near = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""

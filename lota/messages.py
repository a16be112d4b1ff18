"""Words that error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def did_you_mean(word: Any, options: Iterable[Any]) -> str:
    """`. Did you mean 'X'?` with the option nearest to `word`, or nothing: the end of a message."""
    close = difflib.get_close_matches(str(word), [str(option) for option in options], 1)
    return f". Did you mean {close[0]!r}?" if close else ""

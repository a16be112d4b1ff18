"""Words that error messages share."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from typing import Any


def printable(text: str) -> str:
    """The text in one line without what a terminal would obey or hide: control characters, directions of writing, and
    halves of characters become escapes."""
    return "".join(char if _is_plain(char) else char.encode("unicode_escape").decode("ascii") for char in text)


def _is_plain(char: str) -> bool:
    return char == " " or (char.isprintable() and unicodedata.category(char) not in ("Cf", "Cs", "Cc"))


def did_you_mean(word: Any, options: Iterable[Any]) -> str:
    """`. Did you mean 'X'?` with the option nearest to `word`, or nothing: the end of a message."""
    close = difflib.get_close_matches(str(word), [str(option) for option in options], 1)
    return f". Did you mean {close[0]!r}?" if close else ""

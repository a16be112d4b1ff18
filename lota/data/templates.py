"""Templates of columns: text with `{field}` in it, where a field's name is a plain key, and `{{` and `}}` are
braces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """What a column is made of. parts: text, and names of fields (in lists of one), in order.

    A lone field is taken as it is: a conversation stays one.
    """

    parts: tuple[str | tuple[str], ...]

    @classmethod
    def field(cls, name: str) -> Template:
        """The field of that very name, whatever characters it has."""
        return cls(((name,),))

    @classmethod
    def parse(cls, text: str) -> Template:
        """ValueError for a brace without its other one, and for text that names no field."""
        parts: list[str | tuple[str]] = []
        literal, place = "", 0
        while place < len(text):
            pair = text[place : place + 2]
            if pair in ("{{", "}}"):
                literal, place = literal + pair[0], place + 2
            elif text[place] == "{":
                end = text.find("}", place)
                if end < 0:
                    raise ValueError("a { without its }; write '{{' for a brace")
                name = text[place + 1 : end]
                if not name or "{" in name:
                    raise ValueError(f"'{{{name}}}' names no field; write '{{{{' for a brace")
                parts += [literal, (name,)] if literal else [(name,)]
                literal, place = "", end + 1
            elif text[place] == "}":
                raise ValueError("a } without its {; write '}}' for a brace")
            else:
                literal, place = literal + text[place], place + 1
        made = cls(tuple([*parts, literal] if literal else parts))
        if not made.names:
            raise ValueError("it names no field: write for example '{question}'")
        return made

    @property
    def names(self) -> tuple[str, ...]:
        """The fields, each once, in the order in which they come."""
        return tuple(dict.fromkeys(part[0] for part in self.parts if isinstance(part, tuple)))

    @property
    def is_lone(self) -> bool:
        """Whether it is one field and nothing else."""
        return len(self.parts) == 1

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """The fields that have nothing in this row."""
        return [name for name in self.names if is_missing(row.get(name))]

    def is_missing(self, row: Mapping[str, Any]) -> bool:
        """Whether none of the fields has anything in this row, so that there is nothing to learn from."""
        return len(self.missing(row)) == len(self.names)

    def fill(self, row: Mapping[str, Any], text: Any) -> str:
        """The text, with `text(value, name)` for every field; one that is missing is left empty."""
        return "".join(
            part if isinstance(part, str) else ("" if is_missing(row.get(part[0])) else text(row[part[0]], part[0]))
            for part in self.parts
        )


def is_missing(value: Any) -> bool:
    """null, NaN and empty text are one thing in every format (a .csv has no null, a .parquet file often NaN)."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

"""Patterns that name tensors or ranges of their rows: `*q_proj.weight`, `model.embed_tokens.weight[128256:]`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lota.selection.eligible import DEFAULT, matching
from lota.ticket.rows import Rows, whole

_SUFFIX = re.compile(r"\[(-?\d*):(-?\d*)\]$")


def split_rows(
    patterns: Sequence[str] | None, named_shapes: Mapping[str, Sequence[int]], option: str
) -> tuple[list[str] | None, dict[str, Rows]]:
    """The patterns without their ranges, and the range of every tensor that was named with one.

    A range is a Python slice of the first dimension, `[128256:]`, `[:100]` or `[-256:]`. option: what the caller calls
    the patterns, for messages. ValueError for a range that is empty or leaves the tensor, for a tensor that is named
    twice with different ranges, and for a pattern that matches nothing.
    """
    if patterns is None or isinstance(patterns, str):
        return patterns, {}  # type: ignore[return-value]  # whoever matches them refuses a bare string
    plain: list[str] = []
    named: dict[str, dict[Rows, str]] = {}
    for pattern in patterns:
        suffix = _SUFFIX.search(pattern)
        glob = pattern[: suffix.start()] if suffix else pattern
        plain.append(glob)
        if glob == DEFAULT and option == "include":
            continue
        for name in matching(list(named_shapes), [glob], option):
            rows = _rows(suffix, pattern, name, named_shapes[name]) if suffix else whole(named_shapes[name])
            named.setdefault(name, {})[rows] = pattern
    for name, ranges in named.items():
        if len(ranges) > 1:
            raise ValueError(
                f"{option} names different rows of {name}: {' and '.join(ranges.values())}. Name one range of a tensor"
            )
    ranges_of = {name: next(iter(ranges)) for name, ranges in named.items()}
    return plain, {name: rows for name, rows in ranges_of.items() if rows != whole(named_shapes[name])}


def _rows(suffix: re.Match[str], pattern: str, name: str, shape: Sequence[int]) -> Rows:
    length = whole(shape)[1]
    start, stop = (int(text) if text not in ("", "-") else None for text in suffix.groups())
    first = 0 if start is None else start + length * (start < 0)
    last = length if stop is None else stop + length * (stop < 0)
    if not shape or not 0 <= first < last <= length:
        raise ValueError(
            f"{pattern}: expected a range of rows inside {name}, whose shape is {tuple(shape)}, got {first}:{last}"
        )
    return first, last

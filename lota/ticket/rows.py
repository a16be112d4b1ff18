"""Ranges of rows: stretches of a tensor along its first dimension, which lie together in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = tuple[int, int]
"""`start, stop` along a tensor's first dimension."""


def whole(shape: Sequence[int]) -> Rows:
    """All rows of a tensor; a scalar has one."""
    return 0, int(shape[0]) if shape else 1


def row_size(shape: Sequence[int]) -> int:
    """Elements of one row."""
    return math.prod(shape[1:])


def span(shape: Sequence[int], rows: Rows) -> tuple[int, int]:
    """The flat positions `start, stop` of a range of rows."""
    size = row_size(shape)
    return rows[0] * size, rows[1] * size


def check_rows(name: str, shape: Sequence[int], rows: Sequence[int]) -> Rows:
    """`rows` as a tuple; ValueError unless it is a range inside a tensor of that shape."""
    start, stop = (int(row) for row in rows)
    if not 0 <= start <= stop <= whole(shape)[1]:
        raise ValueError(f"{name}: expected rows inside a tensor of shape {tuple(shape)}, got {start}:{stop}")
    return start, stop

"""What is not trained, by pattern, so that nobody takes a part of a model for the whole."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lota.selection.kinds import BLOCK, EMBEDDING, NORM, OUTSIDE, TOWER, kinds

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_LINES = 6
_SMALL = 1e-4


@dataclass(frozen=True)
class LeftOut:
    """Tensors of one kind whose names differ in numbers only, or all blocks of a tower.

    pattern: of `include`, matches them all. numel: their elements. share: of all elements of the model. is_matrix:
    whether they have two or more dimensions.
    """

    kind: str
    pattern: str
    numel: int
    share: float
    is_matrix: bool


def left_out(named_shapes: Mapping[str, Sequence[int]], chosen: Collection[str]) -> list[LeftOut]:
    """What `chosen` does not name, the largest first. Pure.

    named_shapes: full shape of every parameter of the model.
    """
    chosen, total = set(chosen), sum(math.prod(shape) for shape in named_shapes.values())
    found = kinds(named_shapes)
    numels: dict[tuple[str, str], int] = {}
    matrices: set[tuple[str, str]] = set()
    for name, shape in named_shapes.items():
        if name in chosen or not math.prod(shape):
            continue
        key = (found[name], _pattern(name, found[name]))
        numels[key] = numels.get(key, 0) + math.prod(shape)
        if len(shape) >= 2:
            matrices.add(key)
    rows = [
        LeftOut(kind, pattern, numel, numel / total, (kind, pattern) in matrices)
        for (kind, pattern), numel in numels.items()
    ]
    return sorted(rows, key=lambda row: -row.numel)


def left_out_lines(rows: Sequence[LeftOut]) -> list[str]:
    """The same in a few lines: one for embeddings, heads and norms, one for every other pattern."""
    usual = [row for row in rows if row.kind in (EMBEDDING, NORM, OUTSIDE) or row.share < _SMALL]
    lines = []
    if usual:
        share = _percent(sum(row.share for row in usual))
        named = [f"{row.pattern} {_percent(row.share)}" for row in usual if row.share >= _SMALL]
        largest = ", ".join([*named[:3], *(["..."] if usual[3:] else [])])
        lines.append(f"left out: {share} of the weights, embeddings, heads, norms and the like: {largest}")
    unusual = [row for row in rows if row not in usual]
    for row in unusual[:_LINES]:
        kind = "of the blocks" if row.kind == BLOCK else row.kind
        lines.append(f'left out: {_percent(row.share)} of the weights, {kind}; included by "{row.pattern}"')
    if unusual[_LINES:]:
        share = _percent(sum(row.share for row in unusual[_LINES:]))
        lines.append(f"left out: {share} of the weights in {len(unusual) - _LINES} more patterns")
    if unusual:
        lines.append('include replaces the rule; ["default", PATTERN, ...] adds to it')
    return lines


def _pattern(name: str, kind: str) -> str:
    number = _NUMBER.search(name)
    if kind == TOWER and number:
        return name[: number.start()] + ".*"
    return _NUMBER.sub(".*", name)


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= _SMALL else "under 0.01%"

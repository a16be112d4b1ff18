"""What takes part in a run: tensors among which entries are chosen, ranges of their rows, tensors that train whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lota.selection.eligible import eligible, matching
from lota.selection.rows import split_rows
from lota.ticket import Mask
from lota.ticket.rows import Rows, span, whole


@dataclass(frozen=True)
class Candidates:
    """names: tensors among which selection chooses. rows: which rows of them, where not all. dense: tensors (or
    persistent buffers) that are trained and stored whole, with the rows that are."""

    names: tuple[str, ...]
    rows: Mapping[str, Rows]
    dense: Mapping[str, Rows]


def candidates(
    named_shapes: Mapping[str, Sequence[int]],
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dense: Sequence[str] | None = None,
    buffers: Mapping[str, Sequence[int]] | None = None,
) -> Candidates:
    """Who takes part, in the order of `named_shapes`. A dense tensor is not chosen from as well, unless `include` names
    other rows of it.

    include, exclude: see `eligible`; a pattern of `include` may end with a range of rows. dense: patterns likewise,
    over the names of parameters and of `buffers` (shapes of the persistent ones). ValueError as `eligible` and
    `split_rows` raise it.
    """
    whole_tensors = dense_tensors({**named_shapes, **(buffers or {})}, dense)
    _, ranges = split_rows(include, named_shapes, "include")
    for name, (start, stop) in ranges.items():
        first, last = whole_tensors.get(name, (stop, stop))
        if start < last and first < stop:
            raise ValueError(
                f"include names rows {start}:{stop} of {name}, and dense rows {first}:{last}: "
                "name rows that they do not share"
            )
    others = {name: shape for name, shape in named_shapes.items() if name not in whole_tensors or name in ranges}
    plain, rows = split_rows(include, others, "include")
    names = tuple(eligible(others, plain, exclude))
    return Candidates(names, {name: rows[name] for name in names if name in rows}, whole_tensors)


def dense_tensors(named_shapes: Mapping[str, Sequence[int]], patterns: Sequence[str] | None) -> dict[str, Rows]:
    """The tensors that match, with the rows that were named."""
    plain, rows = split_rows(patterns, named_shapes, "dense")
    matched = matching(list(named_shapes), plain, "dense")
    return {name: rows.get(name, whole(shape)) for name, shape in named_shapes.items() if name in matched}


def check_unprotected(dense: Mapping[str, Rows], protect: Sequence[Mask]) -> None:
    """ValueError where a mask protects an entry of a tensor that would be trained whole."""
    for name, rows in dense.items():
        for number, mask in enumerate(protect):
            is_new = name in mask.base and mask.base[name].rows == 0  # each model makes it anew, so nothing is lost
            if name not in mask.names or not mask.active(name) or is_new:
                continue
            start, stop = span(mask.shape(name), rows)
            positions = mask.indices(name)
            taken = int(((positions >= start) & (positions < stop)).sum())
            if taken:
                raise ValueError(
                    f"dense names {name}, of which protect[{number}] protects {taken} entries: leave it out of dense, "
                    "or name rows that are not protected"
                )

"""Where a tensor sits in its model, read from its name: the layer and the kind. For tables and pictures only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """stack: what precedes the layer's number (`model.layers`), "" outside of layers; layer: that number, or None.

    kind: the rest, without `.weight` and with further numbers (experts) as `*`: `self_attn.q_proj`, `experts.*.w1`.
    """

    stack: str
    layer: int | None
    kind: str


def place(name: str) -> Place:
    """The place of tensor `name`; the first part of the name that is a number is the layer's."""
    name = name.removesuffix(".weight")
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdecimal():
            rest = ["*" if later.isdecimal() else later for later in parts[position + 1 :]]
            return Place(".".join(parts[:position]), int(part), ".".join(rest))
    return Place("", None, name)


@dataclass(frozen=True)
class DensityGrid:
    """Density by layer and kind. rows: labels, layers first and in order, then `outside`; cells: `[row][column]`, None
    where the mask names no such tensor. row_density, column_density: over all tensors of a row or column."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    row_density: tuple[float, ...]
    column_density: tuple[float, ...]


def density_grid(counts: Mapping[str, tuple[int, int]], max_rows: int | None = None) -> DensityGrid:
    """counts: active entries and elements by tensor name. max_rows: neighbouring layers share a row beyond that many
    layers of a stack. Tensors outside of layers have a row of their own, at the end."""
    places = {name: place(name) for name in counts}
    labels = _row_labels(places.values(), max_rows)
    kinds = _short({where.kind for where in places.values()})
    totals: dict[tuple[str, str], list[int]] = {}
    for name, (active, numel) in counts.items():
        row, column = labels[places[name].stack, places[name].layer], kinds[places[name].kind]
        for key in ((row, column), (row, ""), ("", column)):
            total = totals.setdefault(key, [0, 0])
            total[0] += active
            total[1] += numel
    rows = tuple(dict.fromkeys(labels.values()))
    columns = tuple(dict.fromkeys(kinds[where.kind] for where in places.values()))

    def density(row: str, column: str) -> float | None:
        active, numel = totals.get((row, column), (0, 0))
        return active / numel if numel else None

    return DensityGrid(
        rows,
        columns,
        tuple(tuple(density(row, column) for column in columns) for row in rows),
        tuple(density(row, "") or 0.0 for row in rows),
        tuple(density("", column) or 0.0 for column in columns),
    )


def _row_labels(places: Iterable[Place], max_rows: int | None) -> dict[tuple[str, int | None], str]:
    """The label of every (stack, layer), in the order of the rows; stacks are named where there are several."""
    layers: dict[str, set[int]] = {}
    has_outside = False
    for where in places:
        if where.layer is None:
            has_outside = True
        else:
            layers.setdefault(where.stack, set()).add(where.layer)
    labels: dict[tuple[str, int | None], str] = {}
    for stack, numbers in layers.items():
        prefix = f"{stack}." if len(layers) > 1 else ""
        ordered = sorted(numbers)
        size = 1 if max_rows is None else -(-len(ordered) // max_rows)
        for begin in range(0, len(ordered), size):
            group = ordered[begin : begin + size]
            span = str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"
            labels |= {(stack, number): prefix + span for number in group}
    if has_outside:
        labels["", None] = "outside"
    return labels


def _short(kinds: set[str]) -> dict[str, str]:
    """Each kind's last part (with what owns it, for a bias) where no other kind ends the same way, else the whole."""
    tails = {kind: ".".join(kind.split(".")[-2 if kind.endswith(".bias") else -1 :]) for kind in kinds}
    counts = Counter(tails.values())
    return {kind: tail if counts[tail] == 1 else kind for kind, tail in tails.items()}

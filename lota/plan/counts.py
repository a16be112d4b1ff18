"""How many entries are trained, and where: the counts that bytes follow from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from lota.kernels import TILE
from lota.plan.model import ModelShapes
from lota.ticket.codec import choose, num_bytes
from lota.ticket.rows import Rows, span, whole

# By how many percent the fullest rank exceeded an even share in the most uneven masks measured: docs/planning.md.
_EXCESS = ((1, 0), (2, 3), (8, 39), (64, 131))


@dataclass(frozen=True)
class LoraSettings:
    """Adapters of `rank` on the matrices `targets`."""

    rank: int
    targets: tuple[str, ...]

    def shapes(self, model: ModelShapes) -> dict[str, tuple[int, ...]]:
        added: dict[str, tuple[int, ...]] = {}
        for name in self.targets:
            rows, columns = model.shapes[name]
            added[f"{name}.lora_A"], added[f"{name}.lora_B"] = (self.rank, columns), (rows, self.rank)
        return added


@dataclass(frozen=True)
class Spread:
    """Where a mask's entries lie, as far as bytes depend on it.

    counts: active entries by tensor. local: entries of the planned rank; fullest: of the fullest one.
    offset_bytes, local_offset_bytes: 2 where every 1024 neighbouring entries span fewer than 65536 positions, else 4.
    received: the most that reaches the planned rank of one tensor's entries: from every rank the number that it owns.
    """

    counts: Mapping[str, int]
    local: int
    fullest: int
    offset_bytes: int
    local_offset_bytes: int
    received: int = 0

    @property
    def active(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class MaskCounts:
    """Eligible tensors and how a mask lies on them: evenly at a density, or as a given mask does."""

    numels: Mapping[str, int]
    spread: Spread
    is_even: bool = True

    @classmethod
    def even(
        cls,
        model: ModelShapes,
        eligible: Sequence[str],
        density: float,
        size: int,
        *,
        rows: Mapping[str, Rows] | None = None,
        dense: Mapping[str, Rows] | None = None,
    ) -> MaskCounts:
        """`round(density * eligible)` entries, spread evenly over tensors and ranks.

        rows: of eligible tensors of which some rows take part, which. dense: tensors with the rows of them that are
        active whole, beside what is chosen; one rank may own all of a range.
        """
        taking_part = {name: _entries(model, name, (rows or {}).get(name)) for name in eligible}
        total = sum(taking_part.values())
        active = round(density * total)
        bounds = [0] + [active * seen // max(1, total) for seen in accumulate(taking_part.values())]
        counts = {name: bounds[i + 1] - bounds[i] for i, name in enumerate(taking_part)}
        whole_ones = {name: _entries(model, name, taken) for name, taken in (dense or {}).items()}
        counts |= {name: counts.get(name, 0) + entries for name, entries in whole_ones.items()}
        numels = {name: math.prod(model.shapes[name]) for name in counts}
        local = -(-active // size) + sum(min(n, -(-numels[name] // size)) for name, n in whole_ones.items())
        # 1024 entries span 1024/density positions on average; the quarter more is over ten standard deviations.
        offset = 2 if total * TILE * 5 // 4 < active << 16 else 4
        return cls(numels, Spread(counts, local, local, offset, offset))

    @property
    def eligible(self) -> int:
        return sum(self.numels.values())

    def encoded(self) -> int:
        """Bytes of the mask as a ticket encodes it."""
        return sum(num_bytes(c[0], n, k, c[1]) for n, k in self._pairs() for c in [choose(n, k)])

    def _pairs(self) -> list[tuple[int, int]]:
        return [(numel, self.spread.counts.get(name, 0)) for name, numel in self.numels.items()]


def _entries(model: ModelShapes, name: str, rows: Rows | None) -> int:
    start, stop = span(model.shapes[name], rows or whole(model.shapes[name]))
    return stop - start


def excess_percent(size: int) -> int:
    """Between the measured numbers of ranks in proportion; beyond them the last."""
    for (low, below), (high, above) in pairwise(_EXCESS):
        if size <= high:
            return below + (above - below) * (size - low) // (high - low)
    return _EXCESS[-1][1]

"""How a mask lies on the ranks, as far as the bytes that they hold depend on it."""

from __future__ import annotations

from collections.abc import Sequence

from lota.plan import MaskCounts, Spread
from lota.ticket import Mask
from lota.zero.compact.survey import survey


def mask_counts(mask: Mask, size: int, rank: int | None = None) -> MaskCounts:
    """Exact counts of `mask` over `size` ranks, seen from `rank` (None: the fullest). One chunk of positions is decoded
    at a time.

    Tensors are taken to stand in one group in the mask's order; more groups add a tile each.
    """
    trained = [(name, mask.numel(name)) for name in mask.names if mask.active(name)]
    found = survey(trained, mask.chunks, size, range(size))
    per_rank = [sum(counts[owner] for counts in found.counts) for owner in range(size)]
    seen = rank if rank is not None else _fullest(per_rank)
    widths = found.whole.offset_bytes, found.own[seen].offset_bytes
    received = size * max((counts[seen] for counts in found.counts), default=0)
    spread = Spread(
        {name: mask.active(name) for name in mask.names}, per_rank[seen], max(per_rank), *widths, received=received
    )
    return MaskCounts({name: mask.numel(name) for name in mask.names}, spread, is_even=False)


def _fullest(per_rank: Sequence[int]) -> int:
    return max(range(len(per_rank)), key=per_rank.__getitem__)

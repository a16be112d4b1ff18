"""How a mask lies on the ranks, as far as the bytes that they hold depend on it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lota.kernels import TILE
from lota.plan import MaskCounts, Spread
from lota.ticket import Mask
from lota.zero.layout import owned_range, owner_counts, partition_numel

_NARROW_SPAN = 1 << 16


class _Spans:
    """The largest distance inside a tile, of positions that come in ascending pieces (see `TileIndex`)."""

    def __init__(self) -> None:
        self._filled, self._base, self.largest = 0, 0, 0

    def add(self, positions: Tensor) -> None:
        if positions.numel() == 0:
            return
        lead = -self._filled % TILE
        if self._filled % TILE:
            last = positions[: lead or None]
            self.largest = max(self.largest, int(last[-1]) - self._base)
        firsts = positions[lead::TILE]
        if firsts.numel():
            lasts = torch.cat((positions[lead + TILE - 1 :: TILE], positions[-1:]))[: firsts.numel()]
            self.largest = max(self.largest, int((lasts - firsts).max()))
            self._base = int(firsts[-1])
        self._filled += positions.numel()

    @property
    def offset_bytes(self) -> int:
        return 2 if self.largest < _NARROW_SPAN else 4


def mask_counts(mask: Mask, size: int, rank: int | None = None) -> MaskCounts:
    """Exact counts of `mask` over `size` ranks, seen from `rank` (None: the fullest). One tensor is decoded at a time.

    Tensors are taken to stand in one group in the mask's order; more groups add a tile each.
    """
    per_rank = [0] * size
    counts: dict[str, int] = {}
    whole, own = _Spans(), [_Spans() for _ in range(size)]
    origin = local_origin = 0
    most = [0] * size
    for name in mask.names:
        numel = math.prod(mask.shape(name))
        counts[name] = mask.active(name)
        if counts[name] == 0:
            continue
        positions = mask.indices(name)
        owned = owner_counts(positions, numel, size)
        whole.add(positions + origin)
        first = 0
        for owner, count in enumerate(owned):
            start, _ = owned_range(numel, size, owner)
            own[owner].add(positions[first : first + count] + (local_origin - start))
            per_rank[owner] += count
            most[owner] = max(most[owner], size * count)
            first += count
        origin, local_origin = origin + numel, local_origin + partition_numel(numel, size)
    seen = rank if rank is not None else _fullest(per_rank)
    widths = whole.offset_bytes, own[seen].offset_bytes
    spread = Spread(counts, per_rank[seen], max(per_rank), *widths, received=most[seen])
    return MaskCounts({name: mask.numel(name) for name in mask.names}, spread, is_even=False)


def _fullest(per_rank: Sequence[int]) -> int:
    return max(range(len(per_rank)), key=per_rank.__getitem__)

"""One pass over a mask, a chunk at a time: which rank owns how many entries, and how far tiles of the indices span."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from lota.kernels import TileSpans
from lota.zero.compact.layout import owner_bounds, partition_numel

Chunks = Callable[[str], Iterable[Tensor]]
"""Ascending int64 positions of a tensor's active entries, a chunk at a time (`Mask.chunks`)."""


@dataclass(frozen=True)
class Survey:
    """What an index needs to know before it is built.

    counts: for each tensor the active entries that each rank owns. whole: spans of the index of all entries. own: of
    the index of one rank's share, for every rank that was looked at.
    """

    counts: list[tuple[int, ...]]
    whole: TileSpans
    own: dict[int, TileSpans]


def survey(tensors: Sequence[tuple[str, int]], chunks: Chunks, size: int, seen: Iterable[int]) -> Survey:
    """Look at the tensors `(name, numel)`, which stand one after another in a group of `size` ranks.

    seen: the ranks whose own index is asked about.
    """
    counts: list[tuple[int, ...]] = []
    whole, own = TileSpans(), {rank: TileSpans() for rank in seen}
    origin = local_origin = 0
    for name, numel in tensors:
        counted = [0] * size
        for chunk in chunks(name):
            whole.add(chunk, origin)
            bounds = owner_bounds(chunk, numel, size)
            for rank, (start, stop) in enumerate(pairwise(bounds)):
                counted[rank] += stop - start
                if stop > start and rank in own:
                    own[rank].add(chunk[start:stop], local_origin - rank * partition_numel(numel, size))
        counts.append(tuple(counted))
        origin, local_origin = origin + numel, local_origin + partition_numel(numel, size)
    return Survey(counts, whole, own)

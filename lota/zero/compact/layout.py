"""Where every tensor's entries live when a group of tensors is sharded over ranks: integers only.

Rank r of a shard group of S ranks holds elements `[r*n, (r+1)*n)` of each flattened tensor, n = ceil(numel / S), the
last piece padded; its pieces of a group's tensors stand behind each other in one flat buffer. The group's active
entries, in tensor order and ascending inside each tensor, form the full compact order; a rank's share of them, in the
same order, is its local compact order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One tensor's place in its group.

    counts[r]: active entries that rank r of the shard group owns. full_start, local_start: where the tensor's entries
    begin in the full and in this rank's local compact order. full_origin, local_origin: where the tensor begins in the
    concatenation of the group's whole tensors, and its piece in this rank's flat buffer.
    """

    name: str
    numel: int
    partition_numel: int
    counts: tuple[int, ...]
    full_start: int
    local_start: int
    full_origin: int
    local_origin: int

    @property
    def num_active(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True)
class CompactLayout:
    """The slots of one group of tensors, seen from rank `rank` of a shard group of `size` ranks."""

    slots: tuple[Slot, ...]
    rank: int
    size: int

    @property
    def full_active(self) -> int:
        return sum(slot.num_active for slot in self.slots)

    @property
    def local_active(self) -> int:
        return self.active_of_rank(self.rank)

    def active_of_rank(self, rank: int) -> int:
        return sum(slot.counts[rank] for slot in self.slots)

    @property
    def full_numel(self) -> int:
        return sum(slot.numel for slot in self.slots)

    @property
    def local_numel(self) -> int:
        return sum(slot.partition_numel for slot in self.slots)


def partition_numel(numel: int, size: int) -> int:
    """Elements of each rank's padded piece of a tensor of `numel` elements over `size` ranks."""
    return -(-numel // size)


def owned_range(numel: int, size: int, rank: int) -> tuple[int, int]:
    """The flat positions `start, stop` of a tensor that `rank` really holds, padding left out (may be empty)."""
    n = partition_numel(numel, size)
    return min(rank * n, numel), min((rank + 1) * n, numel)


def owner_bounds(positions: Tensor, numel: int, size: int) -> list[int]:
    """`size + 1` bounds: of the ascending int64 `positions`, rank r owns those from `bounds[r]` to `bounds[r + 1]`."""
    edges = torch.arange(size + 1, device=positions.device) * partition_numel(numel, size)
    return torch.searchsorted(positions, edges).tolist()


def owner_counts(positions: Tensor, numel: int, size: int) -> tuple[int, ...]:
    """How many of the ascending int64 `positions` each of the `size` ranks owns."""
    return tuple(stop - start for start, stop in pairwise(owner_bounds(positions, numel, size)))


def build_layout(tensors: Sequence[tuple[str, int, tuple[int, ...]]], rank: int) -> CompactLayout:
    """From `(name, numel, counts per rank)` of each tensor, in the order in which their pieces stand in the buffer."""
    slots: list[Slot] = []
    full_start = local_start = full_origin = local_origin = 0
    size = len(tensors[0][2]) if tensors else 1
    for name, numel, counts in tensors:
        n = partition_numel(numel, size)
        slots.append(Slot(name, numel, n, counts, full_start, local_start, full_origin, local_origin))
        full_start, local_start = full_start + sum(counts), local_start + counts[rank]
        full_origin, local_origin = full_origin + numel, local_origin + n
    return CompactLayout(tuple(slots), rank, size)

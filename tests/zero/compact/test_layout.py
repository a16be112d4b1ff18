"""Owners, pieces and compact orders are what DeepSpeed's partitioning says, uneven and empty partitions included."""

from __future__ import annotations

import itertools

import pytest
import torch

from lota.zero.compact.layout import build_layout, owned_range, owner_counts, partition_numel


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("numel", [1, 2, 7, 8, 9, 1000])
def test_owned_ranges_tile_the_tensor(numel, size):
    ranges = [owned_range(numel, size, rank) for rank in range(size)]
    assert ranges[0][0] == 0 and ranges[-1][1] == numel
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(ranges))
    assert all(stop - start <= partition_numel(numel, size) for start, stop in ranges)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_owner_counts(size):
    positions = torch.tensor([0, 3, 4, 5, 30, 31, 36])
    counts = owner_counts(positions, 37, size)
    for rank in range(size):
        start, stop = owned_range(37, size, rank)
        assert counts[rank] == sum(start <= p < stop for p in positions.tolist())


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_build_layout(rank):
    layout = build_layout([("a", 10, (2, 0, 1)), ("b", 4, (0, 0, 0)), ("c", 7, (3, 1, 2))], rank)
    assert layout.full_active == 9
    assert [layout.active_of_rank(r) for r in range(3)] == [5, 1, 3]
    assert [slot.full_start for slot in layout.slots] == [0, 3, 3]
    assert [slot.full_origin for slot in layout.slots] == [0, 10, 14]
    assert [slot.local_origin for slot in layout.slots] == [0, 4, 6]
    assert layout.local_numel == 4 + 2 + 3
    assert [slot.local_start for slot in layout.slots] == [0, (2, 0, 1)[rank], (2, 0, 1)[rank]]

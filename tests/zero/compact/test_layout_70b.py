"""64 ranks of a 70B model: every entry is owned once, and bytes are what the same code counts in a run on 4 ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.layout_70b import (
    RANKS,
    SIZES,
    draw_counts,
    layout_of,
    padded_bytes,
    reducer_of,
    regroup,
    see,
    shapes,
    tables,
)
from lota.selection import eligible
from lota.zero.compact.groups import make_groups
from lota.zero.compact.layout import owned_range
from lota.zero.compact.reduction import GradientReducer
from tests.counting import Traffic

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "planning_70b.md"
BUCKET = 1 << 22


@pytest.fixture(scope="module")
def model():
    return shapes()


@pytest.fixture(scope="module")
def numels(model):
    return {name: math.prod(model.shapes[name]) for name in eligible(model.shapes)}


@pytest.fixture(scope="module")
def drawn(numels):
    return draw_counts(numels, sum(numels.values()) // 100, RANKS)


@pytest.mark.parametrize("size", SIZES)
def test_every_entry_is_owned_once_and_sent_once(numels, drawn, size):
    total = sum(numels.values()) // 100
    counts = regroup(drawn, size)
    layout = layout_of(counts, numels, size - 1)
    owned = [layout.active_of_rank(rank) for rank in range(size)]
    assert sum(owned) == layout.full_active == sum(map(sum, drawn.values())) == total
    assert max(owned) > 1.3 * total / size and min(owned) < 0.7 * total / size, "as uneven as selection makes it"
    full = local = 0
    for slot in layout.slots:
        assert (slot.full_start, slot.local_start) == (full, local)
        full, local = full + slot.num_active, local + slot.counts[size - 1]
        for rank, count in enumerate(slot.counts):
            start, stop = owned_range(slot.numel, size, rank)
            assert 0 <= count <= stop - start
    assert (full, local) == (total, owned[-1])

    reducer = reducer_of(layout, RANKS, BUCKET)
    assert [sum(column) for column in zip(*reducer.splits, strict=True)] == owned
    largest = max(slot.num_active for slot in layout.slots)
    assert max(map(sum, reducer.splits)) <= max(BUCKET, largest)
    assert reducer.payloads == (4 * total, 4 * owned[-1] if size < RANKS else 0)
    assert padded_bytes(reducer.splits) >= size * 4 * max(owned), "widths hold every rank's own"


@pytest.mark.parametrize("size", SIZES)
def test_what_ranks_send_is_what_ranks_receive(model, numels, drawn, size):
    views = [see(model, regroup(drawn, size), numels, rank) for rank in range(size)]
    assert sum(view.sent_inside for view in views) == sum(view.received_inside for view in views)
    for view in views:
        copies = RANKS // size
        assert view.sent_across == 2 * (4 * view.owned * (copies - 1) // copies)
        assert 0 <= view.state - 16 * view.owned < 16 * 1024
        assert view.buffers >= 4 * (BUCKET + 3 * BUCKET)


def _reduce(counts: dict[str, tuple[int, ...]], numels: dict[str, int], size: int, bucket: int) -> dict[str, Any]:
    """One reduction of every tensor's gradient on this rank, counted from outside."""
    groups = make_groups(size).reduction
    layout = layout_of(counts, numels, groups.shard_rank)
    planned = reducer_of(layout, groups.world_size, bucket)
    delivered = 0

    def deliver(slots: range, values: torch.Tensor) -> None:
        nonlocal delivered
        delivered += values.numel()

    rows = [slot.counts for slot in layout.slots]
    count = Traffic()
    with count:
        reducer = GradientReducer(rows, bucket_numel=bucket, groups=groups, deliver=deliver, device=torch.device("cpu"))
        for slot in reversed(range(len(rows))):
            reducer.add(slot, lambda out, is_first: out.fill_(1.0))
        reducer.finish()
    flags = 4 * len(planned.splits) if groups.world is not None else 0
    return {
        "planned": planned.payloads,
        "counted": (count.payload["all_to_all"], count.payload["all_reduce"] - flags),
        "sent": reducer.bytes_sent,
        "peak": (count.peak, planned.buffer_bytes),
        "delivered": (delivered, layout.local_active),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_on_four_ranks_counts_the_same(ranks, size):
    numels = {f"{name}.{layer}": numel for layer in range(6) for name, numel in SMALL.items()}
    counts = regroup(draw_counts(numels, sum(numels.values()) // 100, 64), size)
    for rank, result in enumerate(ranks(4).run(_reduce, dict(counts), numels, size, 4000)):
        assert result["planned"] == result["counted"], f"rank {rank}"
        assert result["sent"] == sum(result["planned"])
        assert result["delivered"][0] == result["delivered"][1]
        peak, planned = result["peak"]
        assert planned / 4 <= peak <= planned + 4096


SMALL = {"q_proj": 128 * 128, "o_proj": 128 * 128, "up_proj": 128 * 448, "down_proj": 128 * 448}


def test_the_document_prints_the_tables():
    assert tables() in DOCUMENT.read_text()

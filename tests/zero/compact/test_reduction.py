"""The reducer delivers the mean over all ranks to the owners, whatever gradients are missing, late or out of order.

Few buckets are on their way at any time, and a bucket that some rank cannot fill is waited for once.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from lota.zero.compact.buckets import Turns
from lota.zero.compact.groups import make_groups
from lota.zero.compact.layout import owned_range
from lota.zero.compact.reduction import GradientReducer, ReductionGroups
from lota.zero.compact.whole_gradients import WholeGradients


def _gradient(slot: int, rank: int, length: int, round_: int) -> torch.Tensor:
    return torch.arange(length) + 100.0 * slot + 10.0 * rank + 1000.0 * round_


def _reduce(
    counts: list[list[int]],
    size: int,
    bucket_numel: int,
    reduce_every: str,
    seed: int,
    wire: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Two micro steps with missing, repeated and shuffled gradients that differ between ranks."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = make_groups(size).reduction
    own = [sum(row[groups.shard_rank] for row in counts[:slot]) for slot in range(len(counts) + 1)]
    got = torch.zeros(own[-1])

    def deliver(slots: range, values: torch.Tensor) -> None:
        got[own[slots.start] : own[slots.stop]] += values

    reducer = GradientReducer(
        counts,
        bucket_numel=bucket_numel,
        groups=groups,
        deliver=deliver,
        device=torch.device("cpu"),
        reduce_every=reduce_every,
        wire=wire,
    )
    expected = [torch.zeros(sum(row)) for row in counts]
    for micro in range(2):
        for source in range(world):
            order = list(range(len(counts))) * 2
            random.Random(seed + 10 * micro + source).shuffle(order)
            for turn, slot in enumerate(order[: len(counts)]):
                gradient = _gradient(slot, source, sum(counts[slot]), 2 * micro + turn % 2)
                expected[slot] += gradient / world
                if source == rank:
                    reducer.add(slot, lambda out, first, g=gradient: out.copy_(g) if first else out.add_(g))
        reducer.finish(last=micro == 1)
    mine = []
    for row, total in zip(counts, expected, strict=True):
        start = sum(row[: groups.shard_rank])
        mine.append(total[start : start + row[groups.shard_rank]])
    return {"got": got, "expected": torch.cat(mine), "sent": reducer.bytes_sent}


def _counts(size: int, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.choice([0, 1, 5, 40]) for _ in range(size)] for _ in range(7)]


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (2, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("reduce_every", ["micro_step", "step"])
def test_mean_over_ranks(ranks, world, size, reduce_every):
    for bucket_numel, seed in itertools.product([1, 60, 10_000], [0, 1]):
        for result in ranks(world).run(_reduce, _counts(size, seed), size, bucket_numel, reduce_every, seed):
            # small integers over a power of two: exact in fp32
            assert torch.equal(result["got"], result["expected"])


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("reduce_every", ["micro_step", "step"])
def test_bf16_on_the_wire_halves_bytes_and_rounds_what_is_sent(ranks, world, size, reduce_every):
    arguments = (_counts(size, 0), size, 60, reduce_every, 0)
    exact = ranks(world).run(_reduce, *arguments)
    rounded = ranks(world).run(_reduce, *arguments, torch.bfloat16)
    for one, other in zip(exact, rounded, strict=True):
        assert 2 * other["sent"] == one["sent"]
        # all values have one sign: sums of rounded ones are as close as each of them, and an all-reduce adds in bf16
        hops = 0 if world == 1 else 1 if size == world else 1 + world // size
        assert (other["got"] - one["expected"]).abs().le(hops * 2**-8 * one["expected"].abs() * 1.01).all()
    for rank, result in enumerate(rounded):
        assert torch.equal(result["got"], rounded[rank % size]["got"]), "replicas agree to the bit"


def _rounds(num_slots: int, size: int, uses: list[list[list[int]]], by_owner: bool) -> list[dict[str, Any]]:
    """Backwards in which rank r gives gradients of the slots `uses[round][r]`, last slot first; every slot is a bucket
    of its own. Of each: whether sums are exact, patience was lost, the most buckets on their way, and what left."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = make_groups(size).reduction
    counts = [[3] * size for _ in range(num_slots)]
    got = torch.zeros(num_slots, 3)

    def deliver(slots: range, values: torch.Tensor) -> None:
        got[slots.start : slots.stop] += values.view(-1, 3)

    reducer = GradientReducer(
        counts, bucket_numel=1, groups=groups, deliver=deliver, device=torch.device("cpu"), by_owner=by_owner
    )
    flights, send = [0], reducer._send

    def watched(index: int, buffer: torch.Tensor | None) -> None:
        send(index, buffer)
        flights.append(len(reducer._flights))

    reducer._send = watched
    found = []
    for number, used in enumerate(uses):
        got.zero_()
        expected = torch.zeros(num_slots, 3)
        for source in range(world):
            for slot in sorted(used[source], reverse=True):
                gradient = _gradient(slot, source, 3 * size, number)
                expected[slot] += gradient.view(size, 3)[groups.shard_rank] / world
                if source != rank:
                    continue
                if by_owner:
                    reducer.add_rows(slot, lambda owner, out, first, g=gradient: out.copy_(g.view(size, 3)[owner:]))
                else:
                    reducer.add(slot, lambda out, first, g=gradient: out.copy_(g))
        was_patient, left = reducer._is_patient, reducer._next
        reducer.finish()
        found.append({"exact": torch.equal(got, expected), "patient": was_patient, "left": left})
    return [round_ | {"most": max(flights)} for round_ in found]


@pytest.mark.parametrize(("world", "size"), [(2, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("by_owner", [False, True])
def test_a_branch_that_ranks_take_differently_is_waited_for_once(ranks, world, size, by_owner):
    """Rank 0 uses every slot, the others every other one. What all use still leaves during backward."""
    uses = [[list(range(12)) if rank == 0 else list(range(1, 12, 2)) for rank in range(world)]] * 5
    for rank, found in enumerate(ranks(world).run(_rounds, 12, size, uses, by_owner)):
        assert all(round_["exact"] for round_ in found)
        assert all(round_["patient"] for round_ in found[1:]), "patience is lost in the first backward only"
        assert all(round_["most"] <= 3 for round_ in found), "the memory of buckets on their way is bounded"
        # A bucket waits for room where the network is slow, so not all need to have left.
        assert all(0 < round_["left"] <= 6 for round_ in found[1:]), f"rank {rank}"


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2)])
def test_any_pattern_of_used_slots_is_exact(ranks, world, size):
    generator = random.Random(0)
    uses = [
        [[slot for slot in range(9) if generator.random() < share] for _ in range(world)]
        for share in (0.9, 0.9, 0.5, 1.0, 0.0, 0.95, 1.0)
    ]
    for found in ranks(world).run(_impatient_rounds, 9, size, uses):
        assert all(round_["exact"] and round_["most"] <= 3 for round_ in found)


def _impatient_rounds(num_slots: int, size: int, uses: list[list[list[int]]]) -> list[dict[str, Any]]:
    from lota.zero.compact import reduction

    before, reduction.PATIENCE = reduction.PATIENCE, 0.02
    try:
        return _rounds(num_slots, size, uses, False)
    finally:
        reduction.PATIENCE = before


def test_a_bucket_that_was_not_full_leaves_last_until_it_was_full_for_long():
    turns = Turns(4)
    turns.learn([1])
    assert (turns.order, turns.num_early) == ([0, 2, 3, 1], 3)
    backwards = _until_early(turns, 1)
    assert (turns.order, turns.num_early) == ([0, 1, 2, 3], 4)
    turns.learn([1])
    assert _until_early(turns, 1) == 2 * backwards, "a relapse costs twice the time"
    turns.learn([1])
    turns.learn([1])
    assert _until_early(turns, 1) == 4 * backwards, "not full again while it is last anyway: no relapse"


def _until_early(turns: Turns, bucket: int) -> int:
    for number in itertools.count():
        if bucket in turns.order[: turns.num_early]:
            return number
        turns.learn([])
    raise AssertionError


def _whole(numels: list[int], size: int, bucket_numel: int, wire: torch.dtype, passes: int) -> dict[str, Any]:
    """Whole gradients of odd shapes, each given `passes` times in one backward; this rank's pieces, and what is due."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = make_groups(size).reduction
    whole = WholeGradients(numels, size, bucket_numel)
    own = [0]
    for counts in whole.counts:
        own.append(own[-1] + counts[groups.shard_rank])
    got = torch.full((own[-1],), float("nan"))

    def deliver(slots: range, values: torch.Tensor) -> None:
        got[own[slots.start] : own[slots.stop]] = values

    reducer = GradientReducer(
        whole.counts,
        bucket_numel=bucket_numel,
        groups=groups,
        deliver=deliver,
        device=torch.device("cpu"),
        reduce_every="step",
        wire=wire,
        by_owner=True,
    )
    pieces = []
    for tensor in reversed(range(len(numels))):
        ours = _whole_gradient(tensor, rank, numels[tensor])
        padded = torch.cat((torch.full((3,), float("nan")), ours)).bfloat16()[3:]  # a view that begins inside a storage
        for _ in range(passes):
            for slot in reversed(whole.slots[tensor]):
                reducer.add_rows(slot, whole.writer(slot, padded))
        start, stop = owned_range(numels[tensor], size, groups.shard_rank)
        total = sum(_whole_gradient(tensor, source, numels[tensor]) for source in range(world))
        pieces.append(passes * total[start:stop] / world)
    reducer.finish()
    return {"got": got, "expected": torch.cat(pieces[::-1]), "sent": reducer.bytes_sent, "counts": whole.counts}


def _whole_gradient(tensor: int, rank: int, numel: int) -> torch.Tensor:
    """Small integers, exact in bf16 and in sums of four."""
    return (torch.arange(numel, dtype=torch.float32) * (tensor + 3) + rank) % 16


@pytest.mark.parametrize(("world", "size"), [(2, 2), (2, 1), (4, 4), (4, 2)])
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_whole_gradients_of_any_shape_reach_their_owners(ranks, world, size, wire):
    numels = [1, 2, 3, 5, 8, 13, 64, 127, 1000, 1023]
    for bucket_numel, passes in ((1, 1), (37, 2), (10_000, 1)):
        for result in ranks(world).run(_whole, numels, size, bucket_numel, wire, passes):
            assert torch.equal(result["got"], result["expected"])
            own = result["got"].numel()
            inside = sum(map(sum, result["counts"])) if size > 1 else 0
            assert result["sent"] == wire.itemsize * (inside + (own if size < world else 0)), "no padding is sent"


@pytest.mark.parametrize(("numel", "size"), [(14336 * 4096, 64), (14336 * 4096 + 1, 64), (4099, 64)])
def test_a_stretch_is_one_copy_for_all_owners_that_have_it_whole(numel, size):
    whole = WholeGradients([numel], size, 1 << 22)
    groups = ReductionGroups(None, None, None, size, size, 0)
    reducer = GradientReducer(
        whole.counts,
        bucket_numel=1 << 22,
        groups=groups,
        deliver=lambda slots, values: None,
        device=torch.device("cpu"),
        by_owner=True,
    )
    for rows, counts in ((reducer._rows[slot], whole.counts[slot]) for slot in range(len(whole.counts))):
        assert sum(row.num_owners * row.count for row in rows) == sum(counts)
        assert len(rows) <= 2, "all owners, or all but the last one whose piece is short"

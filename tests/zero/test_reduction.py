"""The reducer delivers the mean over all ranks to the owners, whatever gradients are missing, late or out of order."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from lota.zero.groups import make_groups
from lota.zero.reduction import GradientReducer


def _gradient(slot: int, rank: int, length: int, round_: int) -> torch.Tensor:
    return torch.arange(length) + 100.0 * slot + 10.0 * rank + 1000.0 * round_


def _reduce(
    counts: list[list[int]],
    size: int,
    bucket_numel: int,
    once_per_step: bool,
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
        once_per_step=once_per_step,
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
@pytest.mark.parametrize("once_per_step", [False, True])
def test_mean_over_ranks(ranks, world, size, once_per_step):
    for bucket_numel, seed in itertools.product([1, 60, 10_000], [0, 1]):
        for result in ranks(world).run(_reduce, _counts(size, seed), size, bucket_numel, once_per_step, seed):
            # small integers over a power of two: exact in fp32
            assert torch.equal(result["got"], result["expected"])


@pytest.mark.parametrize(("world", "size"), [(1, 1), (2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("once_per_step", [False, True])
def test_bf16_on_the_wire_halves_bytes_and_rounds_what_is_sent(ranks, world, size, once_per_step):
    arguments = (_counts(size, 0), size, 60, once_per_step, 0)
    exact = ranks(world).run(_reduce, *arguments)
    rounded = ranks(world).run(_reduce, *arguments, torch.bfloat16)
    for one, other in zip(exact, rounded, strict=True):
        assert 2 * other["sent"] == one["sent"]
        # all values have one sign: sums of rounded ones are as close as each of them, and an all-reduce adds in bf16
        hops = 0 if world == 1 else 1 if size == world else 1 + world // size
        assert (other["got"] - one["expected"]).abs().le(hops * 2**-8 * one["expected"].abs() * 1.01).all()
    for rank, result in enumerate(rounded):
        assert torch.equal(result["got"], rounded[rank % size]["got"]), "replicas agree to the bit"

"""A step keeps its rows on any number of ranks, and where it would not, the message names what to give."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from lota.run.batch import Batch, set_accumulation, whole_steps
from lota.train.trainer import new_seed


@pytest.mark.parametrize(
    ("batch", "rows", "cure"),
    [
        (Batch(4, 4, 2), 32, "on 2 ranks give --gradient_accumulation_steps 4 or --per_device_train_batch_size 4"),
        (Batch(4, 2, 4), 16, "on 4 ranks give --gradient_accumulation_steps 1 or --per_device_train_batch_size 2"),
        (Batch(4, 1, 8), 16, "on 8 ranks give --per_device_train_batch_size 2"),
        (Batch(4, 4, 1), 6, "on 1 ranks give --per_device_train_batch_size 3 --gradient_accumulation_steps 2"),
        (Batch(4, 4, 3), 32, "32 rows cannot be shared out over 3 ranks: use 2 or 4 ranks"),
        (Batch(1, 1, 64), 32, "32 rows cannot be shared out over 64 ranks: use 32 ranks"),
    ],
)
def test_what_would_keep_the_rows(batch: Batch, rows: int, cure: str) -> None:
    assert batch.cure(rows) == cure
    numbers = dict(re.findall(r"--(\w+) (\d+)", cure.split(" or ")[0]))
    if numbers:  # the first of them does what it says
        micro = int(numbers.get("per_device_train_batch_size", batch.micro))
        assert (
            Batch(micro, int(numbers.get("gradient_accumulation_steps", batch.accumulation)), batch.ranks).rows == rows
        )


def test_every_cure_is_one() -> None:
    for micro, steps, ranks, rows in itertools.product((1, 3, 4), (1, 2, 6), (1, 2, 4), (4, 8, 12)):
        for words in Batch(micro, steps, ranks).cure(rows).split("give ")[1].split(" or "):
            given = dict(re.findall(r"--(\w+) (\d+)", words))
            found = given.get("per_device_train_batch_size", micro), given.get("gradient_accumulation_steps", steps)
            assert Batch(*map(int, found), ranks).rows == rows


def test_accumulation_follows_from_the_global_batch() -> None:
    for ranks, steps in ((1, 8), (2, 4), (8, 1)):
        config = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=1)
        set_accumulation(config, 32, ranks, set())
        assert config.gradient_accumulation_steps == steps
    with pytest.raises(ValueError, match="not both"):
        set_accumulation(config, 32, 2, {"gradient_accumulation_steps"})
    with pytest.raises(ValueError, match=r"multiple of .* 4 x 16, got 32: give --per_device_train_batch_size 2$"):
        set_accumulation(config, 32, 16, set())
    with pytest.raises(ValueError, match=r"multiple of the number of ranks, 3, got 32: change it, or use 2 or 4 ranks"):
        set_accumulation(config, 32, 3, set())
    with pytest.raises(ValueError, match="got 0"):
        set_accumulation(config, 0, 3, set())


def steps_of(sampler, micro: int, accumulation: int, ranks: int) -> list[list[int]]:
    """Rows of every step, dealt out as accelerate does, and put together in the order of micro steps and ranks."""

    def batches() -> BatchSampler:
        order = sampler
        if isinstance(sampler, RandomSampler):  # every rank has one of its own, as under the Trainer
            order = SeedableRandomSampler(sampler.data_source, num_samples=sampler._num_samples, data_seed=7)
        return BatchSampler(order, micro, False)

    shards = [BatchSamplerShard(batches(), ranks, rank) if ranks > 1 else batches() for rank in range(ranks)]
    lists = [list(shard) for shard in shards]
    micro_steps = [list(itertools.chain(*batches)) for batches in zip(*lists, strict=True)]
    assert len({len(batches) for batches in lists}) == 1
    return [
        list(itertools.chain(*micro_steps[first : first + accumulation]))
        for first in range(0, len(micro_steps), accumulation)
    ]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 21, 64])
@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler])
def test_all_ranks_see_the_rows_of_one(length: int, kind: type) -> None:
    rows = [*range(length)]
    layouts = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 1, 4), (1, 1, 8)]
    found = [steps_of(whole_steps(kind(rows), 8, False), *layout) for layout in layouts]
    assert all(steps == found[0] for steps in found)
    assert {len(step) for step in found[0]} == {8} and len(found[0]) == -(-length // 8)
    flat = list(itertools.chain(*found[0]))
    assert sorted(flat[:length]) == rows  # an epoch has every row before it has one again
    if length % 8 == 0:  # nothing to fill up, nothing changed
        assert type(whole_steps(kind(rows), 8, False)) is kind and found[0] == steps_of(kind(rows), 8, 1, 1)


def test_the_trainer_alone_would_see_other_rows() -> None:
    rows = [*range(21)]
    assert steps_of(RandomSampler(rows), 2, 4, 1) != steps_of(RandomSampler(rows), 2, 1, 4)


def test_drop_last_drops_what_makes_no_step() -> None:
    for kind in (RandomSampler, SequentialSampler):
        found = [steps_of(whole_steps(kind([*range(21)]), 8, True), *layout) for layout in ((2, 4, 1), (2, 1, 4))]
        assert found[0] == found[1] and [len(step) for step in found[0]] == [8, 8]
    with pytest.raises(ValueError, match="leaves nothing of 7 rows at 8 rows a step"):
        whole_steps(RandomSampler([*range(7)]), 8, True)


def test_seeds_of_new_ranks_are_their_own() -> None:
    seeds = {new_seed(seed, step, rank) for seed in (0, 42) for step in (10, 20) for rank in range(8)}
    assert len(seeds) == 32 and all(0 <= seed < 2**32 for seed in seeds)
    assert new_seed(42, 10, 3) == new_seed(42, 10, 3)
    torch.manual_seed(new_seed(1, 2, 3))

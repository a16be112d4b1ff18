"""Which entries travel together, and in which order: the buckets of a reduction, fixed before the first backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from torch import Tensor

_FIRST_PENALTY = 16  # backwards


@dataclass(frozen=True)
class Rows:
    """Entries of one slot in a bucket that stands owner after owner: `count` of each of `num_owners` owners from
    `first_owner` on, the first at `start`, the next ones `stride` further each."""

    first_owner: int
    num_owners: int
    count: int
    start: int
    stride: int

    def of(self, buffer: Tensor) -> Tensor:
        return buffer.as_strided((self.num_owners, self.count), (self.stride, 1), buffer.storage_offset() + self.start)


@dataclass
class Bucket:
    """Consecutive slots that are sent together.

    slots: which. numel: their entries over all owners. send_splits: `[shard_size]`, entries that go to each rank of the
    shard group; own_numel: this rank's of them. buffer: fp32 `[numel]` while it is being filled. arrived: slots whose
    gradient is in it.
    """

    slots: range
    numel: int
    send_splits: list[int]
    own_numel: int
    buffer: Tensor | None = None
    arrived: set[int] = field(default_factory=set)
    is_launched: bool = False

    @property
    def is_full(self) -> bool:
        return len(self.arrived) == len(self.slots)


class Turns:
    """In which order buckets leave: the same on every rank, because all learn from the same agreed facts.

    A bucket that one rank cannot fill (a conditional branch that it did not take) would hold up every bucket behind it
    on that rank, and the other ranks would wait for those. So it leaves after backward, behind all others, until it was
    full on every rank in `penalty` backwards in a row; the penalty doubles at each relapse. Values do not depend on the
    order: every bucket has entries of its own.
    """

    def __init__(self, num_buckets: int) -> None:
        self._sits_out, self._penalty = [0] * num_buckets, [_FIRST_PENALTY // 2] * num_buckets
        self.order = list(range(num_buckets))
        self.num_early = num_buckets

    def learn(self, unfilled: Sequence[int]) -> None:
        """unfilled: buckets that some rank had not filled when its backward ended, the same on all ranks."""
        for index in range(len(self._sits_out)):
            self._sits_out[index] = max(0, self._sits_out[index] - 1)
        for index in unfilled:
            if self._sits_out[index] == 0:
                self._penalty[index] *= 2
            self._sits_out[index] = self._penalty[index]
        early = [index for index, turns in enumerate(self._sits_out) if not turns]
        self.order = early + [index for index, turns in enumerate(self._sits_out) if turns]
        self.num_early = len(early)


def plan_buckets(counts: Sequence[Sequence[int]], bucket_numel: int, rank: int) -> list[Bucket]:
    """Consecutive slots, last slots first: backward produces gradients roughly in reverse order.

    counts: `[slots][shard_size]`, entries of each slot by owner. rank: this one's place in the shard group.
    """
    buckets: list[Bucket] = []
    stop = len(counts)
    while stop > 0:
        start, numel = stop - 1, sum(counts[stop - 1])
        while start > 0 and numel + sum(counts[start - 1]) <= bucket_numel:
            start -= 1
            numel += sum(counts[start])
        # [shard_size]: entries of the bucket that each owner gets
        splits = [sum(column) for column in zip(*counts[start:stop], strict=True)]
        buckets.append(Bucket(range(start, stop), numel, splits, splits[rank]))
        stop = start
    return buckets


def starts_in_bucket(counts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> dict[int, int]:
    starts: dict[int, int] = {}
    for bucket in buckets:
        position = 0
        for slot in bucket.slots:
            starts[slot] = position
            position += sum(counts[slot])
    return starts


def rows_in_bucket(counts: Sequence[Sequence[int]], buckets: Sequence[Bucket]) -> dict[int, list[Rows]]:
    """Where every slot's entries stand in buckets that stand owner after owner.

    The first owners have equally many entries of every slot, so theirs are one strided block; the last ones, whose
    pieces of a tensor are short or empty, come one by one.
    """
    rows: dict[int, list[Rows]] = {}
    for bucket in buckets:
        size, stride = len(bucket.send_splits), bucket.send_splits[0]
        num_equal = min(_num_like_first(counts[slot]) for slot in bucket.slots)
        begins = list(accumulate(bucket.send_splits, initial=0))[:size]
        for slot in bucket.slots:
            row = counts[slot]
            block = Rows(0, num_equal, row[0], begins[0], stride)
            rest = [Rows(owner, 1, row[owner], begins[owner], row[owner]) for owner in range(num_equal, size)]
            rows[slot] = [run for run in (block, *rest) if run.count]
            begins[0] += row[0]
            for owner in range(num_equal, size):
                begins[owner] += row[owner]
    return rows


def _num_like_first(row: Sequence[int]) -> int:
    """How many leading numbers equal the first."""
    return next((place for place, number in enumerate(row) if number != row[0]), len(row))

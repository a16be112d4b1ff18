"""Gradients of many tensors, reduced to the ranks that own them as backward produces them.

A tensor contributes one flat vector (its compact gradient, or the whole one for calibration) whose entries belong to
the ranks of the shard group in ascending pieces of known sizes. Vectors are packed into buckets that are fixed before
the first backward. A full bucket is sent by `all_to_all_single` with exact split sizes, summed in rank order
(deterministic, no padding: the masks that selection makes are uneven over ranks), and all-reduced across the replicas
of the shard group. What is sent may be rounded to bf16: micro steps and the sum over a shard group are still added up
in fp32; an all-reduce adds in bf16.

Ranks may disagree about which tensors were used. Buckets are therefore launched in one fixed order on process groups of
their own, asynchronously; a bucket that is not full by the end of backward is sent then, with zeros for what is
missing. A rank never waits forever inside backward for a bucket (another rank may need this one's weights first): it
waits for older buckets only for `PATIENCE` seconds, which bounds the memory of buckets in flight in every ordinary run.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = 2.0
_IN_FLIGHT = 2


@dataclass(frozen=True)
class ReductionGroups:
    """Process groups that carry nothing but gradients. `None` stands for a group of one rank."""

    shard: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None
    world: dist.ProcessGroup | None
    shard_size: int
    world_size: int
    shard_rank: int


@dataclass
class _Bucket:
    slots: range
    numel: int
    send_splits: list[int]
    own_numel: int
    buffer: Tensor | None = None
    arrived: set[int] = field(default_factory=set)
    is_launched: bool = False


@dataclass
class _Flight:
    """A bucket on its way: to its owners (`sent` is set), then, summed, to the replicas."""

    bucket: int
    work: dist.Work | None
    values: Tensor
    sent: Tensor | None


class GradientReducer:
    """Reduces one vector per slot to its owners and hands each bucket's mean over all ranks to `deliver`.

    counts: per slot, how many entries each rank of the shard group owns; the slot's vector has their sum as length.
    bucket_numel: most entries in a bucket (a single longer slot still makes a bucket of its own).
    deliver(slots, values): called with consecutive slots and this rank's reduced entries of them, fp32, slot after
    slot.
    once_per_step: keep the sums of all micro steps and send only in `finish(last=True)`; costs a full set of buckets.
    wire: dtype of what is sent, fp32 or bf16.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        *,
        bucket_numel: int,
        groups: ReductionGroups,
        deliver: Callable[[range, Tensor], None],
        device: torch.device,
        once_per_step: bool = False,
        wire: torch.dtype = torch.float32,
    ) -> None:
        self.wire = wire
        self.counts, self.groups, self.device, self.once_per_step = counts, groups, device, once_per_step
        self._deliver = deliver
        self._buckets = _plan_buckets(counts, bucket_numel, groups.shard_rank)
        self._bucket_of = {slot: b for b, bucket in enumerate(self._buckets) for slot in bucket.slots}
        self._start = _starts_in_bucket(counts, self._buckets)
        self._next = 0
        self._flights: deque[_Flight] = deque()
        self._late: dict[int, Tensor] = {}
        self._is_patient = True
        self.bytes_sent = 0

    @property
    def buffer_bytes(self) -> int:
        """Most bytes of buffers in an ordinary backward: buckets being filled (fp32), packed, sent and received.

        From every rank a rank receives as many entries as it owns itself: more than a bucket, where it owns many. With
        shard groups of one rank, what was filled is all-reduced in place.
        """
        size, world = self.groups.shard_size, self.groups.world_size
        if self.once_per_step:
            filling = sum(bucket.numel for bucket in self._buckets)
        else:
            filling = max((bucket.numel for bucket in self._buckets), default=0)
        received = size if size > 1 else 0
        one = max((bucket.numel + received * bucket.own_numel for bucket in self._buckets), default=0)
        on_their_way = (_IN_FLIGHT + 1) * one if world > 1 else 0
        return 4 * filling + self.wire.itemsize * on_their_way

    @property
    def splits(self) -> list[list[int]]:
        """Of every bucket, in the order of sending: how many entries go to each rank of the shard group."""
        return [bucket.send_splits for bucket in self._buckets]

    @property
    def payloads(self) -> tuple[int, int]:
        """Bytes of the buffers that one reduction hands to collectives in the shard group, and across groups; together
        what `bytes_sent` grows by where no gradient is late."""
        groups = self.groups
        inside = sum(bucket.numel for bucket in self._buckets) if groups.shard_size > 1 else 0
        across = sum(bucket.own_numel for bucket in self._buckets) if groups.shard_size < groups.world_size else 0
        return self.wire.itemsize * inside, self.wire.itemsize * across

    def add(self, slot: int, write: Callable[[Tensor, bool], None]) -> None:
        """Take a slot's gradient: `write(out, is_first)` stores it into the zeroed `out` or adds it to earlier ones."""
        index = self._bucket_of[slot]
        bucket = self._buckets[index]
        start, length = self._start[slot], sum(self.counts[slot])
        if bucket.is_launched:
            if index not in self._late:
                self._late[index] = torch.zeros(bucket.numel, device=self.device)
            buffer = self._late[index]
            write(buffer[start : start + length], False)
            return
        if bucket.buffer is None:
            bucket.buffer = torch.zeros(bucket.numel, device=self.device)
        write(bucket.buffer[start : start + length], slot not in bucket.arrived)
        bucket.arrived.add(slot)
        if not self.once_per_step:
            while self._next < len(self._buckets) and self._is_full(self._next):
                self._launch(self._next)
            self._retire_ready()

    def finish(self, last: bool = True) -> None:
        """End of a backward (`last`: of the step's last one): send what is left, with zeros for missing gradients, and
        deliver everything. Collective over all ranks."""
        if self.once_per_step and not last:
            return
        while self._next < len(self._buckets):
            self._launch(self._next)
            # Waiting is safe here: this rank's backward is over, so no other rank's waits for it.
            self._retire_all(but=_IN_FLIGHT)
        self._retire_all()
        for index in self._agree_on_late():
            bucket = self._buckets[index]
            bucket.buffer = self._late.pop(index, None)
            self._send(index)
        self._retire_all()
        for bucket in self._buckets:
            bucket.is_launched = False
            bucket.arrived.clear()
        self._next, self._is_patient = 0, True

    def discard(self) -> None:
        """Forget gradients that were not sent yet."""
        for bucket in self._buckets:
            bucket.buffer = None
            bucket.arrived.clear()
        self._late.clear()

    def _is_full(self, index: int) -> bool:
        return len(self._buckets[index].arrived) == len(self._buckets[index].slots)

    def _launch(self, index: int) -> None:
        self._buckets[index].is_launched = True
        self._next = index + 1
        self._send(index)

    def _send(self, index: int) -> None:
        bucket, groups = self._buckets[index], self.groups
        buffer = torch.zeros(bucket.numel, device=self.device) if bucket.buffer is None else bucket.buffer
        bucket.buffer = None
        if groups.shard is None:
            self._flights.append(self._to_replicas(index, buffer))
            return
        sent = self._pack_by_owner(bucket, buffer.to(self.wire))
        received = torch.empty(groups.shard_size * bucket.own_numel, dtype=self.wire, device=self.device)
        work = dist.all_to_all_single(
            received,
            sent,
            [bucket.own_numel] * groups.shard_size,
            bucket.send_splits,
            group=groups.shard,
            async_op=True,
        )
        self.bytes_sent += sent.nbytes
        self._flights.append(_Flight(index, work, received, sent))

    def _to_replicas(self, index: int, values: Tensor) -> _Flight:
        """The second leg: sum over the ranks that own the same entries in other shard groups."""
        if self.groups.replica is None:
            return _Flight(index, None, values, None)
        values = values.to(self.wire)
        self.bytes_sent += values.nbytes
        return _Flight(index, dist.all_reduce(values, group=self.groups.replica, async_op=True), values, None)

    def _pack_by_owner(self, bucket: _Bucket, buffer: Tensor) -> Tensor:
        """Reorder slot after slot into owner after owner."""
        pieces = buffer.split([n for slot in bucket.slots for n in self.counts[slot]])
        size = self.groups.shard_size
        return torch.cat([piece for rank in range(size) for piece in pieces[rank::size]])

    def _retire_ready(self) -> None:
        """Move buckets on without waiting for other ranks, except for older ones and then only for `PATIENCE`."""
        for position, flight in enumerate(self._flights):
            if flight.sent is None:
                continue
            if not self._is_done(flight):
                break  # the second leg starts in the order of the first on every rank
            self._flights[position] = self._sum_over_ranks(flight)
        while self._flights and self._flights[0].sent is None and self._is_done(self._flights[0]):
            self._retire(self._flights.popleft())

    def _is_done(self, flight: _Flight) -> bool:
        if flight.work is None or flight.work.is_completed():
            return True
        if len(self._flights) <= _IN_FLIGHT or not self._is_patient:
            return False
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if flight.work.is_completed():
                return True
            time.sleep(0.0005)
        self._is_patient = False
        return False

    def _retire_all(self, but: int = 0) -> None:
        """Wait for the oldest buckets until at most `but` are on their way."""
        count = max(len(self._flights) - but, 0)
        for position in range(count):
            if self._flights[position].sent is not None:
                self._flights[position] = self._sum_over_ranks(self._flights[position])
        for _ in range(count):
            self._retire(self._flights.popleft())

    def _sum_over_ranks(self, flight: _Flight) -> _Flight:
        assert flight.work is not None
        flight.work.wait()
        pieces = flight.values.view(self.groups.shard_size, -1)
        total = pieces[0].float()
        for piece in pieces[1:]:
            total.add_(piece)
        return self._to_replicas(flight.bucket, total)

    def _retire(self, flight: _Flight) -> None:
        if flight.work is not None:
            flight.work.wait()
        self._deliver(self._buckets[flight.bucket].slots, flight.values.float().mul_(1.0 / self.groups.world_size))

    def _agree_on_late(self) -> list[int]:
        """Buckets that some rank still has gradients for: tensors used again after their bucket was sent."""
        if self.groups.world is None:
            return sorted(self._late)
        flags = torch.zeros(len(self._buckets), dtype=torch.int32)
        flags[list(self._late)] = 1
        flags = flags.to(self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.groups.world)
        return flags.nonzero().flatten().tolist()


def _plan_buckets(counts: Sequence[Sequence[int]], bucket_numel: int, rank: int) -> list[_Bucket]:
    """Consecutive slots, last slots first: backward produces gradients roughly in reverse order."""
    buckets: list[_Bucket] = []
    stop = len(counts)
    while stop > 0:
        start, numel = stop - 1, sum(counts[stop - 1])
        while start > 0 and numel + sum(counts[start - 1]) <= bucket_numel:
            start -= 1
            numel += sum(counts[start])
        splits = [sum(column) for column in zip(*counts[start:stop], strict=True)]
        buckets.append(_Bucket(range(start, stop), numel, splits, splits[rank]))
        stop = start
    return buckets


def _starts_in_bucket(counts: Sequence[Sequence[int]], buckets: Sequence[_Bucket]) -> dict[int, int]:
    starts: dict[int, int] = {}
    for bucket in buckets:
        position = 0
        for slot in bucket.slots:
            starts[slot] = position
            position += sum(counts[slot])
    return starts

"""Gradients of many tensors, reduced to the ranks that own them as backward produces them.

A tensor contributes one flat vector (its compact gradient, or a stretch of the whole one for calibration) whose entries
belong to the ranks of the shard group in ascending pieces of known sizes. Vectors are packed into buckets that are
fixed before the first backward. A full bucket is sent by `all_to_all_single` with exact split sizes, summed in rank
order (deterministic, no padding: the masks that selection makes are uneven over ranks), and all-reduced across the
replicas of the shard group. What is sent may be rounded to bf16: micro steps and the sum over a shard group are still
added up in fp32; an all-reduce adds in bf16.

Ranks may disagree about which tensors were used. Buckets therefore leave in one order that all ranks share, on process
groups of their own, asynchronously; a bucket that is not full by the end of backward is sent then, with zeros for what
is missing. Buckets that some rank could not fill in time leave after the others from then on (`Turns`). A rank never
waits forever inside backward for a bucket, because another rank may need this one's weights first: it waits for older
buckets for its patience only, and then keeps full buckets until there is room or backward is over. So at most
`_IN_FLIGHT + 1` buckets are on their way at any time.

A bucket passes through: being filled (`Bucket.buffer`) -> first leg, to its owners (`_Flight.sent` is set) -> second
leg, summed, across replicas (`sent` is None) -> delivered.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lota.zero.compact.buckets import Bucket, Turns, plan_buckets, rows_in_bucket, starts_in_bucket

PATIENCE = 2.0
"""Most seconds that a rank inside a backward waits for older buckets: a network slower than it is waited for."""

_LEAST_PATIENCE = 0.01
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

    @property
    def is_one_rank(self) -> bool:
        """Whether there is nobody to reduce with."""
        return self.shard is None and self.replica is None


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
    reduce_every: "step" keeps the sums of all micro steps and sends only in `finish(last=True)`; it costs a full set of
    buckets.
    wire: dtype of what is sent, fp32 or bf16.
    by_owner: buckets stand owner after owner from the start and are filled by `add_rows`; else slot after slot, filled
    by `add`, and are packed into that order when they are sent.
    """

    def __init__(
        self,
        counts: Sequence[Sequence[int]],
        *,
        bucket_numel: int,
        groups: ReductionGroups,
        deliver: Callable[[range, Tensor], None],
        device: torch.device,
        reduce_every: str = "micro_step",
        wire: torch.dtype = torch.float32,
        by_owner: bool = False,
    ) -> None:
        self.wire, self.by_owner = wire, by_owner
        self.counts, self.groups, self.device, self.reduce_every = counts, groups, device, reduce_every
        self._deliver = deliver
        self._buckets = plan_buckets(counts, bucket_numel, groups.shard_rank)
        self._bucket_of = {slot: b for b, bucket in enumerate(self._buckets) for slot in bucket.slots}
        self._start = {} if by_owner else starts_in_bucket(counts, self._buckets)
        self._rows = rows_in_bucket(counts, self._buckets) if by_owner else {}
        self._turns = Turns(len(self._buckets))
        self._next = 0  # place in the order of the next bucket to leave
        self._flights: deque[_Flight] = deque()
        self._late: dict[int, Tensor] = {}
        self._patience, self._is_patient = PATIENCE, True
        self.bytes_sent = 0

    @property
    def buffer_bytes(self) -> int:
        """Most bytes of buffers in an ordinary backward: buckets being filled (fp32), packed, sent and received.

        From every rank a rank receives the number of entries that it owns itself: more than a bucket, where it owns
        many. With shard groups of one rank, what was filled is all-reduced in place.
        """
        size, world = self.groups.shard_size, self.groups.world_size
        if self.reduce_every == "step":
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
        """Take a slot's gradient: `write(out, is_first)` stores it into `out`, which may hold anything, or adds it to
        earlier ones."""
        buffer, is_first = self._buffer_for(slot)
        start = self._start[slot]
        write(buffer[start : start + sum(self.counts[slot])], is_first)
        self._arrive(slot)

    def add_rows(self, slot: int, write: Callable[[int, Tensor, bool], None]) -> None:
        """`add` where buckets stand owner after owner: `write(owner, out, is_first)` is called for runs of owners, out
        `[owners, entries of each]` being a strided view for `owner` and the following ones."""
        buffer, is_first = self._buffer_for(slot)
        for rows in self._rows[slot]:
            write(rows.first_owner, rows.of(buffer), is_first)
        self._arrive(slot)

    def _buffer_for(self, slot: int) -> tuple[Tensor, bool]:
        """The bucket that takes the slot's gradient, and whether it holds none of it yet."""
        index = self._bucket_of[slot]
        bucket = self._buckets[index]
        if bucket.is_launched:
            # A tensor is used again after its bucket left: a second bucket, which leaves when all ranks know of it.
            if index not in self._late:
                self._late[index] = torch.zeros(bucket.numel, dtype=torch.float32, device=self.device)
            return self._late[index], False
        if bucket.buffer is None:
            bucket.buffer = torch.empty(bucket.numel, dtype=torch.float32, device=self.device)
        return bucket.buffer, slot not in bucket.arrived

    def _arrive(self, slot: int) -> None:
        bucket = self._buckets[self._bucket_of[slot]]
        if bucket.is_launched or self.reduce_every == "step":
            bucket.arrived.add(slot)
            return
        bucket.arrived.add(slot)
        self._retire_ready()
        # Only buckets that were full everywhere lately, and only in their turn, though a later one may be full first:
        # ranks that sent in different orders would wait for each other.
        while self._next < self._turns.num_early and self._buckets[self._turns.order[self._next]].is_full:
            if len(self._flights) > _IN_FLIGHT:
                break  # no patience left: it stays filled, which takes half the memory of being on its way
            self._launch()
            self._retire_ready()

    def finish(self, last: bool = True) -> None:
        """End of a backward (`last`: of the step's last one): send what is left, with zeros for missing gradients, and
        deliver everything. Collective over all ranks."""
        if self.reduce_every == "step" and not last:
            return
        unfilled = [index for index in self._turns.order[self._next :] if not self._buckets[index].is_full]
        while self._next < len(self._buckets):
            # Waiting is safe here: this rank's backward is over, so no other rank's waits for it.
            self._retire_all(but=_IN_FLIGHT)
            self._launch()
        self._retire_all()
        late, unfilled = self._agree(unfilled)
        for index in late:
            self._retire_all(but=_IN_FLIGHT)
            self._send(index, self._late.pop(index, None))
        self._retire_all()
        for bucket in self._buckets:
            bucket.is_launched = False
            bucket.arrived.clear()
        self._next = 0
        if self.reduce_every == "micro_step":
            self._turns.learn(unfilled)
        if not self._is_patient and unfilled:
            # It was lost on a bucket that could not come. After a slow network, which comes in the end, it stays.
            self._patience = max(self._patience / 8, min(_LEAST_PATIENCE, PATIENCE))
        self._is_patient = True

    def discard(self) -> None:
        """Forget gradients that were not sent yet."""
        for bucket in self._buckets:
            bucket.buffer = None
            bucket.arrived.clear()
        self._late.clear()

    def _launch(self) -> None:
        """Send the bucket whose turn it is, with zeros for the slots that it lacks."""
        index = self._turns.order[self._next]
        bucket = self._buckets[index]
        buffer, bucket.buffer = bucket.buffer, None
        if buffer is not None and not bucket.is_full:
            for slot in bucket.slots:
                if slot not in bucket.arrived:
                    self._clear(slot, buffer)
        bucket.is_launched = True
        self._next += 1
        self._send(index, buffer)

    def _clear(self, slot: int, buffer: Tensor) -> None:
        if self.by_owner:
            for rows in self._rows[slot]:
                rows.of(buffer).zero_()
        else:
            buffer[self._start[slot] : self._start[slot] + sum(self.counts[slot])].zero_()

    def _send(self, index: int, buffer: Tensor | None) -> None:
        """Start the first leg. buffer: the bucket's fp32 entries; None where this rank has no gradient for it."""
        bucket, groups = self._buckets[index], self.groups
        if buffer is None:
            buffer = torch.zeros(bucket.numel, dtype=torch.float32, device=self.device)
        if groups.shard is None:
            self._flights.append(self._to_replicas(index, buffer))
            return
        sent = buffer.to(self.wire)  # [numel], owner after owner below
        if not self.by_owner:
            sent = self._pack_by_owner(bucket, sent)
        # [shard_size * own_numel]: from every rank the entries that this one owns
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

    def _pack_by_owner(self, bucket: Bucket, buffer: Tensor) -> Tensor:
        """Reorder slot after slot into owner after owner."""
        # [slots * shard_size] pieces, slot by slot; every shard_size-th of them belongs to the same owner
        pieces = buffer.split([n for slot in bucket.slots for n in self.counts[slot]])
        size = self.groups.shard_size
        return torch.cat([piece for rank in range(size) for piece in pieces[rank::size]])

    def _retire_ready(self) -> None:
        """Move buckets on without waiting for other ranks, except for older ones and then only while patient."""
        for position, flight in enumerate(self._flights):
            if flight.sent is None:
                continue  # on its second leg already
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
        started = time.monotonic()
        while time.monotonic() - started < self._patience:
            if flight.work.is_completed():
                # Worth waiting for: the network is slower than this backward.
                self._patience = min(2 * self._patience, PATIENCE)
                return True
            time.sleep(0.0005)
        self._is_patient = False  # for the rest of this backward
        return False

    def _retire_all(self, but: int = 0) -> None:
        """Wait for the oldest buckets until at most `but` are on their way."""
        count = max(len(self._flights) - but, 0)
        # All second legs start before the first is waited for, so that they overlap.
        for position in range(count):
            if self._flights[position].sent is not None:
                self._flights[position] = self._sum_over_ranks(self._flights[position])
        for _ in range(count):
            self._retire(self._flights.popleft())

    def _sum_over_ranks(self, flight: _Flight) -> _Flight:
        assert flight.work is not None
        flight.work.wait()
        # One after the other, from rank 0 on: the same bits every time, on whatever ranks own the entries.
        pieces = flight.values.view(self.groups.shard_size, -1)  # [shard_size, own_numel]
        total = pieces[0].float()
        for piece in pieces[1:]:
            total.add_(piece)
        return self._to_replicas(flight.bucket, total)

    def _retire(self, flight: _Flight) -> None:
        if flight.work is not None:
            flight.work.wait()
        # [own_numel] sums over all ranks become the mean that DeepSpeed's loss scaling expects
        self._deliver(self._buckets[flight.bucket].slots, flight.values.float().mul_(1.0 / self.groups.world_size))

    def _agree(self, unfilled: Sequence[int]) -> tuple[list[int], list[int]]:
        """Buckets that some rank still has gradients for (tensors used again after their bucket left), and those that
        some rank had not filled. One number for each bucket: the ranks that lack it, and `base` times those it is late
        on."""
        base = self.groups.world_size + 1
        numbers = torch.zeros(len(self._buckets), dtype=torch.int32)  # [buckets], counts of ranks in two digits
        numbers[list(unfilled)] += 1
        numbers[list(self._late)] += base
        numbers = numbers.to(self.device)
        if self.groups.world is not None:
            dist.all_reduce(numbers, group=self.groups.world)
        found = numbers.tolist()
        late = [index for index, number in enumerate(found) if number >= base]
        return late, [index for index, number in enumerate(found) if number % base]

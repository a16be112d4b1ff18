"""Whole gradients cut into slots of the reducer, so that buckets stay small however large a tensor is.

Every rank's piece of a tensor (n entries, see `layout`) is cut at the same places into stretches; one slot carries one
stretch of all ranks' pieces, owner after owner, so its entries are spread evenly over their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lota.zero.compact.layout import owned_range, partition_numel


@dataclass(frozen=True)
class Stretch:
    """One slot. tensor: its place in the given order. offset: where it begins in every rank's piece; counts[r]: how
    many real entries of it rank r owns."""

    tensor: int
    offset: int
    counts: tuple[int, ...]


class WholeGradients:
    """The slots of tensors of `numels` elements over `size` ranks, at most `bucket_numel` entries (or one a rank)."""

    def __init__(self, numels: Sequence[int], size: int, bucket_numel: int) -> None:
        self._numels, self._size = tuple(numels), size
        self._length = max(1, bucket_numel // size)
        self.stretches: list[Stretch] = []
        self.slots: list[range] = []
        for tensor, numel in enumerate(numels):
            first = len(self.stretches)
            for offset in range(0, partition_numel(numel, size), self._length):
                self.stretches.append(Stretch(tensor, offset, self._counts(numel, offset)))
            self.slots.append(range(first, len(self.stretches)))

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """What `GradientReducer` wants to know."""
        return [stretch.counts for stretch in self.stretches]

    def _counts(self, numel: int, offset: int) -> tuple[int, ...]:
        """How many entries of one stretch every rank owns: none beyond its real piece, which is short or empty on the
        last ranks."""
        spans = (owned_range(numel, self._size, rank) for rank in range(self._size))
        return tuple(min(max(stop - start - offset, 0), self._length) for start, stop in spans)

    def writer(self, slot: int, gradient: Tensor) -> Callable[[int, Tensor, bool], None]:
        """`write(owner, out, is_first)` of one slot, for `GradientReducer.add_rows`, from a tensor's flat gradient (any
        float dtype): one strided copy for all owners with equally many entries."""
        stretch = self.stretches[slot]
        piece = partition_numel(self._numels[stretch.tensor], self._size)

        def write(owner: int, out: Tensor, is_first: bool) -> None:
            start = gradient.storage_offset() + owner * piece + stretch.offset
            rows = gradient.as_strided(out.shape, (piece, 1), start)
            if is_first:
                out.copy_(rows)
            else:
                out.add_(rows)

        return write

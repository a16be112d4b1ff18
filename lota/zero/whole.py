"""Whole gradients cut into slots of the reducer, so that buckets stay small however large a tensor is.

Every rank's piece of a tensor (n entries, see `layout`) is cut at the same places into stretches; one slot carries one
stretch of all ranks' pieces, owner after owner, so its entries are spread evenly over their owners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lota.zero.layout import owned_range, partition_numel


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
                counts = tuple(stop - start for start, stop in self._spans(numel, offset))
                self.stretches.append(Stretch(tensor, offset, counts))
            self.slots.append(range(first, len(self.stretches)))

    @property
    def counts(self) -> list[tuple[int, ...]]:
        """What `GradientReducer` wants to know."""
        return [stretch.counts for stretch in self.stretches]

    def _spans(self, numel: int, offset: int) -> list[tuple[int, int]]:
        """The flat positions `start, stop` of one stretch on every rank (empty beyond a rank's real piece)."""
        spans = []
        for rank in range(self._size):
            start, stop = owned_range(numel, self._size, rank)
            first = min(start + offset, stop)
            spans.append((first, min(first + self._length, stop)))
        return spans

    def writer(self, slot: int, gradient: Tensor) -> Callable[[Tensor, bool], None]:
        """`write(out, is_first)` of one slot from a tensor's flat gradient (any float dtype)."""
        stretch = self.stretches[slot]
        spans = self._spans(self._numels[stretch.tensor], stretch.offset)

        def write(out: Tensor, is_first: bool) -> None:
            filled = 0
            for start, stop in spans:
                piece = out[filled : filled + stop - start]
                if is_first:
                    piece.copy_(gradient[start:stop])
                else:
                    piece.add_(gradient[start:stop])
                filled += stop - start

        return write

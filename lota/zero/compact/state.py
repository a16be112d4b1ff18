"""Compact state of one group of tensors on one rank: masters, moments and gradients of its active entries.

Everything but the weights lives here: the index of active entries, fp32 masters, moments and accumulated gradients (one
value per active entry that this rank owns), and the base's values of those entries in host memory, which the ticket
needs for undoing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lota.kernels import CHUNK, TileIndex, gather, padded_zeros
from lota.zero.compact.layout import CompactLayout, Slot, build_layout, owned_range, owner_bounds
from lota.zero.compact.survey import Chunks, survey


class CompactState:
    """Index, masters, moments and gradient of the tensors `names`, whose pieces stand in `weights` one after another.

    weights: flat `[layout.local_numel]` buffer of this rank's padded pieces, in the model's dtype; never copied.
    chunks(name): a tensor's active entries (the whole tensor's); read twice here, and not kept.
    index_device: where gradients appear; it holds the index of all the group's entries, with which they are gathered
    before they are reduced; None where only this rank's share is needed, because whole gradients are reduced.
    group: position of the tensors' parameter group in the caller's optimizer. origin: where `weights` begins in the
    space in which stochastic rounding counts places.

    Beside what is held, building takes a chunk of positions: a first pass counts and finds how wide the offsets are, a
    second one writes them.
    """

    def __init__(
        self,
        names: Sequence[str],
        numels: Sequence[int],
        weights: Tensor,
        chunks: Chunks,
        rank: int,
        size: int,
        index_device: torch.device | None,
        *,
        group: int = 0,
        origin: int = 0,
    ) -> None:
        self.weights, self.group, self.origin = weights, group, origin
        tensors = list(zip(names, numels, strict=True))
        found = survey(tensors, chunks, size, [rank])
        counted = zip(tensors, found.counts, strict=True)
        self.layout: CompactLayout = build_layout([(*tensor, counts) for tensor, counts in counted], rank)
        if self.layout.local_numel != weights.numel():
            raise ValueError(
                f"the group's pieces hold {self.layout.local_numel} elements, its buffer {weights.numel()}"
            )
        layout = self.layout
        self.full_index: TileIndex | None = None
        if index_device is not None:
            pieces = (chunk.add_(slot.full_origin) for slot in layout.slots for chunk in chunks(slot.name))
            self.full_index = TileIndex.from_pieces(
                pieces, layout.full_active, layout.full_numel, index_device, span=found.whole.largest
            )
        if self.full_index is not None and size == 1 and index_device == weights.device:
            self.local_index = self.full_index
        else:
            local = (piece for slot in layout.slots for piece in self._local_positions(slot, chunks))
            self.local_index = TileIndex.from_pieces(
                local, layout.local_active, layout.local_numel, weights.device, span=found.own[rank].largest
            )
        self.master = padded_zeros(self.local_index)
        gather(weights, self.local_index, out=self.master[: layout.local_active])
        self.gradient = padded_zeros(self.local_index)
        self.moments: dict[str, Tensor] = {}
        self.base_values = torch.empty(layout.local_active, dtype=weights.dtype)
        for start, stop in self.runs(0, layout.local_active):
            self.base_values[start:stop].copy_(self.values(start, stop))

    def _local_positions(self, slot: Slot, chunks: Chunks) -> Iterator[Tensor]:
        """Positions in this rank's flat buffer of the slot's entries that it owns, a chunk at a time."""
        rank, size = self.layout.rank, self.layout.size
        start, _ = owned_range(slot.numel, size, rank)
        if self.full_index is not None:
            first = slot.full_start + sum(slot.counts[:rank])
            for chunk in self.full_index.chunks(first, first + slot.counts[rank]):
                yield chunk.add_(slot.local_origin - slot.full_origin - start)
            return
        for chunk in chunks(slot.name):
            bounds = owner_bounds(chunk, slot.numel, size)
            if bounds[rank + 1] > bounds[rank]:
                yield chunk[bounds[rank] : bounds[rank + 1]] + (slot.local_origin - start)

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The compact entries `start:stop` in runs that are short enough to be looked at together."""
        for first in range(start, stop, CHUNK):
            yield first, min(first + CHUNK, stop)

    def values(self, start: int, stop: int) -> Tensor:
        """The weights' own bits at this rank's compact entries `start:stop`, on the weights' device."""
        return gather(
            self.weights, self.local_index, out=self.weights.new_empty(stop - start), start=start, stop=stop
        )

    def add_moment(self, name: str) -> None:
        self.moments[name] = padded_zeros(self.local_index)

    def accumulate(self, slot: Slot, values: Tensor) -> None:
        """Add this rank's reduced gradients of a tensor (fp32) to what earlier micro steps left."""
        self.gradient[self.entries(slot)].add_(values.to(self.gradient.device))

    def entries(self, slot: Slot) -> slice:
        """Where the slot's entries stand in this rank's compact vectors."""
        return slice(slot.local_start, slot.local_start + slot.counts[self.layout.rank])

    def dense_piece(self, slot: Slot, values: Tensor, fill: Tensor | None = None) -> Tensor:
        """This rank's padded piece of a tensor, in the dtype of `values`: compact `values` at its active entries and
        `fill` elsewhere."""
        piece = values.new_zeros(slot.partition_numel) if fill is None else fill.to(values.dtype)
        entries = self.entries(slot)
        positions = self.local_index.positions(entries.start, entries.stop) - slot.local_origin
        return piece.index_copy_(0, positions, values[entries])

    def slot_weights(self, slot: Slot) -> Tensor:
        """This rank's padded piece of the tensor's weights (a view)."""
        return self.weights[slot.local_origin : slot.local_origin + slot.partition_numel]

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind; the index counts once where the full and the local one are the same."""
        indices = {id(index): index for index in (self.full_index, self.local_index) if index is not None}
        return {
            "index": sum(index.nbytes for index in indices.values()),
            "master": self.master.nbytes,
            "moments": sum(moment.nbytes for moment in self.moments.values()),
            "gradient": self.gradient.nbytes,
            "base_values_host": self.base_values.nbytes,
        }

    def slots(self) -> Iterator[Slot]:
        return iter(self.layout.slots)

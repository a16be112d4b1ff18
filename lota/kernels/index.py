"""The run-time index of active entries: tiles of 1024 entries with a 64-bit base and 16- or 32-bit offsets.

A flat space of `numel` elements has `num_active` active ones. Their positions, ascending, are cut into tiles of `TILE`
entries; a tile keeps the int64 position of its first entry and the distance of every entry from it. That is 2 bytes an
entry where every tile spans fewer than 65536 positions (densities above about 2%), else 4, for spaces of any size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

TILE = 1024
_NARROW_SPAN = 1 << 16
_WIDE_SPAN = 1 << 31
_CHUNK_WORDS = 1 << 15  # of bit words that are spread out at a time: a million positions
CHUNK = 1 << 20
"""Most entries whose positions exist as int64 at a time."""
_CPU_RUN = 1 << 16  # entries that are computed together on CPUs, where they stay in a cache
_FEW = 1 << 7  # positions that are looked up at a time, each among the entries of a tile


class TileIndex:
    """Ascending positions of the active entries of one flat space.

    base: int64 `[num_tiles]`, position of each tile's first entry.
    offset: `[num_tiles * TILE]`, distance from the base; int16 (the bits of a uint16) or int32; the tail is padded with
    0. num_active, numel: entries in the index, elements in the space.

    Built from flat positions, from pieces of them, or from bit words. The index of a ticket's tensor comes from
    `from_pieces(mask.chunks(name), mask.active(name), numel, device)`, which decodes either codec a chunk at a time, or
    without a position in between where the codec is the bit map: its bytes, padded to whole words and viewed as int32,
    are the words that `from_words` takes.

    Beside the index that is made, and the pieces that the caller gives, building holds a few int64 for each entry of a
    chunk (`CHUNK` entries at most). Offsets begin as int16; at the first tile that spans too much for them, those that
    are there are copied, which takes up to 2 bytes an entry more where `from_pieces` did not get the span.

    `check_range=False` leaves out the check that positions lie in `[0, numel)`, for positions that were checked before,
    and no other check: an operation with an index that is out of range reads and writes other memory.
    """

    __slots__ = ("base", "num_active", "numel", "offset")

    def __init__(self, base: Tensor, offset: Tensor, num_active: int, numel: int) -> None:
        self.base, self.offset, self.num_active, self.numel = base, offset, num_active, numel

    @classmethod
    def from_flat(cls, positions: Tensor, numel: int, *, check_range: bool = True) -> TileIndex:
        """From all positions at once: int64, ascending, unique, in `[0, numel)`; ValueError otherwise."""
        spans = TileSpans()
        if positions.dim() == 1:
            spans.add(positions)
        return cls.from_pieces(
            [positions], positions.numel(), numel, positions.device, span=spans.largest, check_range=check_range
        )

    @classmethod
    def from_words(cls, words: Tensor, numel: int, *, check_range: bool = True) -> TileIndex:
        """From bit words as `mask_op` takes them: position p is active where bit `p % 32` of `words[p // 32]` is set.

        words: int32 `[ceil(numel / 32)]`, contiguous, bit 0 the least significant; the index lies on their device.
        ValueError where they have another dtype, shape or length, or a bit behind the last element is set. Reads the
        counts of active entries back to the host.
        """
        expected = -(-numel // 32)
        if words.dtype != torch.int32 or words.shape != (expected,) or not words.is_contiguous():
            raise ValueError(
                f"words must be contiguous int32 of shape ({expected},) for {numel} elements, got {words.dtype} of "
                f"shape {tuple(words.shape)} and strides {words.stride()}"
            )
        num_active = sum(int(bits.sum()) for _, bits in _spread_words(words))
        pieces = (bits.nonzero().squeeze(1).add_(first) for first, bits in _spread_words(words))
        return cls.from_pieces(pieces, num_active, numel, words.device, check_range=check_range)

    @classmethod
    def from_pieces(
        cls,
        pieces: Iterable[Tensor],
        num_active: int,
        numel: int,
        device: torch.device | str,
        *,
        span: int | None = None,
        check_range: bool = True,
    ) -> TileIndex:
        """From int64 pieces that together ascend, so that only one piece is alive as int64 at a time.

        num_active: how many positions the pieces hold together, known beforehand. span: the largest distance inside a
        tile where that is known, too (`TileSpans`), so that offsets have their final width at once. Raises ValueError
        where the positions do not ascend strictly, leave `[0, numel)`, are not `num_active`, or do not have that span.
        """
        made = _Builder(num_active, numel, torch.device(device), span, check_range)
        for piece in pieces:
            for chunk in piece.split(CHUNK) if piece.dim() == 1 else [piece]:
                made.add(chunk.to(device))
        return made.finish()

    def positions(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int64 positions of the entries `start:stop` of the compact order."""
        stop = self.num_active if stop is None else stop
        if not 0 <= start <= stop <= self.num_active:
            raise ValueError(f"entries {start}:{stop} lie outside the index of {self.num_active} active entries")
        if start == stop:
            return torch.empty(0, dtype=torch.int64, device=self.base.device)
        positions = self.offset[start:stop].to(torch.int64)
        if self.offset.dtype == torch.int16:
            positions &= _NARROW_SPAN - 1
        first_tile = start // TILE
        bases = self.base[first_tile : -(-stop // TILE)].repeat_interleave(TILE)
        return positions.add_(bases[start - first_tile * TILE : stop - first_tile * TILE])

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """The same as `positions`, at most `CHUNK` entries at a time; each chunk is the caller's own."""
        stop = self.num_active if stop is None else stop
        for begin in range(start, stop, CHUNK):
            yield self.positions(begin, min(begin + CHUNK, stop))

    def slice(self, start: int, stop: int) -> TileIndex:
        """The index of the elements `start:stop` as a space of their own: of `stop - start` elements, beginning at 0.

        What a rank needs that holds this piece of the space. Reads two entry numbers back to the host.
        """
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"elements {start}:{stop} lie outside the index's space of {self.numel}")
        edges = torch.tensor([start, stop], dtype=torch.int64, device=self.base.device)
        first, last = self.entries_before(edges).tolist()
        pieces = (chunk.sub_(start) for chunk in self.chunks(first, last))
        span = self._span(first, last)
        return TileIndex.from_pieces(pieces, last - first, stop - start, self.base.device, span=span)

    def _span(self, first: int, last: int) -> int:
        """The largest distance inside a tile, were the entries `first:last` cut into tiles from `first` on."""
        if first == last:
            return 0
        firsts = torch.arange(first, last, TILE, device=self.base.device)
        return int((self._at((firsts + (TILE - 1)).clamp_(max=last - 1)) - self._at(firsts)).max())

    def _at(self, entries: Tensor) -> Tensor:
        """Positions of single entries (int64, any shape)."""
        offset = self.offset[entries].to(torch.int64)
        if self.offset.dtype == torch.int16:
            offset &= _NARROW_SPAN - 1
        return offset.add_(self.base[entries // TILE])

    def entries_before(self, positions: Tensor) -> Tensor:
        """How many active entries stand before each of the int64 `positions` `[n]`, in any order: int64 `[n]`."""
        if self.num_active == 0:
            return torch.zeros_like(positions)
        found = [
            self._entries_before(positions[begin : begin + _FEW]) for begin in range(0, positions.numel(), _FEW)
        ]
        return torch.cat(found) if found else positions

    def _entries_before(self, positions: Tensor) -> Tensor:
        # The last tile that begins before the position; where none does, no entry of the first one stands before it.
        first = (torch.searchsorted(self.base, positions) - 1).clamp_(min=0).mul_(TILE)
        entries = first[:, None] + torch.arange(TILE, device=first.device)
        is_before = (self._at(entries) < positions[:, None]).logical_and_(entries < self.num_active)
        return first.add_(is_before.sum(1))

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.offset.nbytes


class TileSpans:
    """The largest distance inside a tile, of positions that come in ascending chunks: what decides how wide the offsets
    of their index are, before it is built."""

    def __init__(self) -> None:
        self.num_entries, self.base, self.largest = 0, 0, 0

    def add(self, positions: Tensor, shift: int = 0) -> None:
        """Take the next chunk: int64 `[n]`, every position moved by `shift`."""
        if positions.numel() == 0:
            return
        lead = -self.num_entries % TILE
        if lead:
            self.largest = max(self.largest, int(positions[:lead][-1]) + shift - self.base)
        firsts = positions[lead::TILE]
        if firsts.numel():
            lasts = torch.cat((positions[lead + TILE - 1 :: TILE], positions[-1:]))[: firsts.numel()]
            self.largest = max(self.largest, int((lasts - firsts).max()))
            self.base = int(firsts[-1]) + shift
        self.num_entries += positions.numel()

    @property
    def offset_bytes(self) -> int:
        """2 or 4: what an entry takes in the index of these positions."""
        return 2 if self.largest < _NARROW_SPAN else 4


class _Builder:
    """An index that grows by ascending chunks on its own device."""

    def __init__(self, num_active: int, numel: int, device: torch.device, span: int | None, check_range: bool) -> None:
        self.num_active, self.numel, self._expected_span = num_active, numel, span
        num_tiles = -(-num_active // TILE)
        is_wide = span is not None and span >= _NARROW_SPAN
        self._base = torch.zeros(num_tiles, dtype=torch.int64, device=device)
        self._offset = torch.zeros(num_tiles * TILE, dtype=torch.int32 if is_wide else torch.int16, device=device)
        self._spans = TileSpans()
        self._last = -1 if check_range else torch.iinfo(torch.int64).min
        self._limit = numel if check_range else None

    def add(self, positions: Tensor) -> None:
        self._last = _check_ascending(positions, self._last, self._limit)
        filled, count = self._spans.num_entries, positions.numel()
        if filled + count > self.num_active:
            raise ValueError(f"expected {self.num_active} positions, got at least {filled + count}")
        if count == 0:
            return
        begun_at = self._spans.base
        self._spans.add(positions)
        if self._spans.largest >= _WIDE_SPAN:
            raise ValueError(
                f"{TILE} neighbouring active entries span {self._spans.largest} positions; at most 2**31 are supported"
            )
        if self._spans.largest >= _NARROW_SPAN and self._offset.dtype == torch.int16:
            self._widen(filled)
        lead = min(-filled % TILE, count)
        first_tile = -(-filled // TILE)
        self._base[first_tile : -(-(filled + count) // TILE)] = positions[lead::TILE]
        if lead:
            self._write(filled, positions[:lead] - begun_at)
        run = _CPU_RUN if positions.device.type == "cpu" else CHUNK
        for begin in range(lead, count, run):
            self._write_tiles(filled + begin, positions[begin : begin + run])

    def _write_tiles(self, entry: int, positions: Tensor) -> None:
        """Offsets of positions that begin with a tile."""
        whole = positions.numel() // TILE * TILE
        tiles = positions[:whole].view(-1, TILE)
        self._write(entry, (tiles - tiles[:, :1]).view(-1))
        if whole < positions.numel():
            self._write(entry + whole, positions[whole:] - positions[whole])

    def _write(self, entry: int, distance: Tensor) -> None:
        """Offsets from an entry on; `distance` is overwritten."""
        if self._offset.dtype == torch.int16:  # the bits of a uint16: 32768 and more become negative
            distance.bitwise_xor_(_NARROW_SPAN // 2).sub_(_NARROW_SPAN // 2)
        self._offset[entry : entry + distance.numel()] = distance

    def _widen(self, filled: int) -> None:
        """Continue in 4 bytes an entry. What is there is set aside first, so that the old offsets end before the new
        ones begin."""
        num_entries, device = self._offset.numel(), self._offset.device
        kept = self._offset[:filled].clone()
        del self._offset
        self._offset = torch.zeros(num_entries, dtype=torch.int32, device=device)
        for begin in range(0, filled, CHUNK):
            chunk = kept[begin : begin + CHUNK].to(torch.int32)
            self._offset[begin : begin + chunk.numel()] = chunk.bitwise_and_(_NARROW_SPAN - 1)

    def finish(self) -> TileIndex:
        """The index, once all its positions are there."""
        if self._spans.num_entries != self.num_active:
            raise ValueError(f"expected {self.num_active} positions, got {self._spans.num_entries}")
        if self._expected_span is not None and self._expected_span != self._spans.largest:
            raise ValueError(
                f"expected {TILE} neighbouring entries to span at most {self._expected_span} positions, got "
                f"{self._spans.largest}: the span is not of these positions"
            )
        return TileIndex(self._base, self._offset, self.num_active, self.numel)


def _spread_words(words: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, a 0 or 1 for each) of bit words, a chunk at a time."""
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    for begin in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[begin : begin + _CHUNK_WORDS]
        yield 32 * begin, (chunk[:, None] >> shifts).bitwise_and_(1).flatten()


def _check_ascending(positions: Tensor, last: int, numel: int | None) -> int:
    """The last position, after checking that `positions` ascends from `last` and, where given, stays below `numel`."""
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(
            f"positions must be a flat int64 tensor, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if positions.numel() == 0:
        return last
    if int(positions[0]) <= last or (positions[1:] <= positions[:-1]).any():
        raise ValueError("positions must ascend strictly; sort them and remove duplicates")
    if numel is not None and int(positions[-1]) >= numel:
        raise ValueError(f"position {int(positions[-1])} lies outside the space of {numel} elements")
    return int(positions[-1])

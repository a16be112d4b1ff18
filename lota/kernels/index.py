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
_CHUNK_ENTRIES = 1 << 22


class TileIndex:
    """Ascending positions of the active entries of one flat space.

    base: int64 `[num_tiles]`, position of each tile's first entry.
    offset: `[num_tiles * TILE]`, distance from the base; int16 (the bits of a uint16) or int32; the tail is padded with
    0. num_active, numel: entries in the index, elements in the space.

    Built from flat positions, from pieces of them, or from bit words. The index of a ticket's tensor comes from
    `from_flat(mask.indices(name), numel)`, which decodes either codec, or without a position in between where the codec
    is the bit map: its bytes, padded to whole words and viewed as int32, are the words that `from_words` takes.

    `check_range=False` leaves out the check that positions lie in `[0, numel)`, for positions that were checked before,
    and no other check: an operation with an index that is out of range reads and writes other memory.
    """

    __slots__ = ("base", "num_active", "numel", "offset")

    def __init__(self, base: Tensor, offset: Tensor, num_active: int, numel: int) -> None:
        self.base, self.offset, self.num_active, self.numel = base, offset, num_active, numel

    @classmethod
    def from_flat(cls, positions: Tensor, numel: int, *, check_range: bool = True) -> TileIndex:
        """From all positions at once: int64, ascending, unique, in `[0, numel)`; ValueError otherwise."""
        return cls.from_pieces([positions], positions.numel(), numel, positions.device, check_range=check_range)

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
        check_range: bool = True,
    ) -> TileIndex:
        """From int64 pieces that together ascend, so that only one piece is alive as int64 at a time.

        num_active: how many positions the pieces hold together, known beforehand. Raises ValueError where the positions
        do not ascend strictly, leave `[0, numel)`, or are not `num_active`.
        """
        num_tiles = -(-num_active // TILE)
        base = torch.zeros(num_tiles, dtype=torch.int64, device=device)
        offset = torch.zeros(num_tiles * TILE, dtype=torch.int32, device=device)
        filled, last = 0, -1 if check_range else torch.iinfo(torch.int64).min
        for piece in pieces:
            positions = piece.to(device)
            last = _check_ascending(positions, last, numel if check_range else None)
            count = positions.numel()
            if filled + count > num_active:
                raise ValueError(f"expected {num_active} positions, got at least {filled + count}")
            if count == 0:
                continue
            first_tile = -(-filled // TILE)
            base[first_tile : -(-(filled + count) // TILE)] = positions[first_tile * TILE - filled :: TILE]
            tile = torch.arange(filled, filled + count, device=device).div_(TILE, rounding_mode="floor")
            distance = positions - base[tile]
            if int(distance.max()) >= _WIDE_SPAN:
                raise ValueError(
                    f"{TILE} neighbouring active entries span {int(distance.max())} positions; at most 2**31 are "
                    "supported"
                )
            offset[filled : filled + count] = distance.to(torch.int32)
            filled += count
        if filled != num_active:
            raise ValueError(f"expected {num_active} positions, got {filled}")
        if num_active == 0 or int(offset.max()) < _NARROW_SPAN:
            offset = torch.where(offset >= _NARROW_SPAN // 2, offset - _NARROW_SPAN, offset).to(torch.int16)
        return cls(base, offset, num_active, numel)

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

    def slice(self, start: int, stop: int) -> TileIndex:
        """The index of the elements `start:stop` as a space of their own: of `stop - start` elements, beginning at 0.

        What a rank needs that holds this piece of the space. Reads two entry numbers back to the host.
        """
        if not 0 <= start <= stop <= self.numel:
            raise ValueError(f"elements {start}:{stop} lie outside the index's space of {self.numel}")
        first, last = self._entries_before(start), self._entries_before(stop)
        pieces = (
            self.positions(begin, min(begin + _CHUNK_ENTRIES, last)).sub_(start)
            for begin in range(first, last, _CHUNK_ENTRIES)
        )
        return TileIndex.from_pieces(pieces, last - first, stop - start, self.base.device)

    def _entries_before(self, position: int) -> int:
        """How many active entries stand before a position."""
        tile = int(torch.searchsorted(self.base, position)) - 1  # the last one that begins before it
        if tile < 0:
            return 0
        first = tile * TILE
        return first + int((self.positions(first, min(first + TILE, self.num_active)) < position).sum())

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.offset.nbytes


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

"""Codecs of an index: ascending positions to few bytes and back, by Elias-Fano coding or as a bit map.

Bit strings are little-endian: bit k is bit `k % 8` (1 = least significant) of byte `k // 8`; unused last bits are zero.

bitmap      bit p of the string is set where position p is active; ceil(numel / 8) bytes.
elias_fano  with `low_bits` = l: the l low bits of every position, one after another (entry i at bits `i*l ... i*l+l-1`,
            least significant first), ceil(num_active * l / 8) bytes; then a string of
            `num_active + ((numel - 1) >> l) + 1` bits in which bit `(position_i >> l) + i` is set for every entry i.
            No bytes at all when num_active is 0. (Elias 1974, Fano 1971; within 2 + l bits an entry.)

All work is vectorised in chunks that stay in cache; nothing loops over entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BITMAP, ELIAS_FANO = "bitmap", "elias_fano"
CODECS = (ELIAS_FANO, BITMAP)
MAX_NUMEL = 1 << 62
MAX_LOW_BITS = 62
_CHUNK_BYTES = 1 << 17  # of a bit string: 1 Mi bits at a time
_CHUNK_ENTRIES = 1 << 18


@dataclass(frozen=True)
class EncodedIndex:
    """The active positions of one tensor of `numel` elements, encoded.

    codec: `elias_fano` or `bitmap`. low_bits: Elias-Fano's parameter, 0 for a bit map. data: uint8 on the CPU, exactly
    `num_bytes(codec, numel, num_active, low_bits)` long. Two indices that `encode` made are the same set of positions
    exactly when their codec, parameters and data are equal.
    """

    codec: str
    numel: int
    num_active: int
    low_bits: int
    data: Tensor

    @property
    def is_canonical(self) -> bool:
        """Whether `encode` would have chosen this codec and parameter."""
        return (self.codec, self.low_bits) == choose(self.numel, self.num_active)


def encode(positions: Tensor, numel: int) -> EncodedIndex:
    """Encode int64 positions `[n]`, ascending strictly, in `[0, numel)` (else ValueError), by the smaller codec."""
    _check_positions(positions, numel)
    positions = positions.cpu()
    num_active = positions.numel()
    codec, low_bits = choose(numel, num_active)
    if codec == BITMAP:
        data = _set_bits(positions, numel)
    elif num_active == 0:
        data = torch.empty(0, dtype=torch.uint8)
    else:
        low = _pack(positions, low_bits)
        high = (positions >> low_bits).add_(torch.arange(num_active))
        data = torch.cat([low, _set_bits(high, _num_high_bits(numel, num_active, low_bits))])
    return EncodedIndex(codec, numel, num_active, low_bits, data)


def decode(index: EncodedIndex) -> Tensor:
    """Positions of `index`: int64 `[num_active]`, ascending. ValueError where the data is no ascending index in range.

    Safe on data from anywhere: what is allocated is bounded by `data`, not by what the other fields claim.
    """
    check(index)
    positions, filled = torch.empty(index.num_active, dtype=torch.int64), 0
    for chunk in _decode(index):
        positions[filled : filled + chunk.numel()] = chunk
        filled += chunk.numel()
    return positions


def decode_chunks(index: EncodedIndex) -> Iterator[Tensor]:
    """The same positions in ascending chunks, none empty, each at most a million entries and the caller's own.

    ValueError before the first chunk where length or counts are wrong, and in place of the first chunk that does not
    ascend or leaves the range.
    """
    check(index)
    yield from _decode(index)


def _decode(index: EncodedIndex) -> Iterator[Tensor]:
    """Ascending chunks of an index that `check` has passed."""
    if index.num_active == 0:
        return
    is_bitmap = index.codec == BITMAP
    data = index.data if is_bitmap else index.data[_num_low_bytes(index.num_active, index.low_bits) :]
    filled, last = 0, -1
    for positions in _find_bits(data):
        if not is_bitmap:
            _put_low_bits(positions, index, filled)
        if int(positions[0]) <= last or not (positions[1:] > positions[:-1]).all():
            raise ValueError("expected ascending positions, got positions that repeat or descend")
        filled, last = filled + positions.numel(), int(positions[-1])
        if last >= index.numel:
            raise ValueError(f"expected positions below {index.numel}, got {last}")
        yield positions


def _put_low_bits(high: Tensor, index: EncodedIndex, first: int) -> None:
    """Turn the bits found in the string of high bits, those of the entries `first ...`, into positions; in place."""
    for begin in range(0, high.numel(), _CHUNK_ENTRIES):
        chunk, entry = high[begin : begin + _CHUNK_ENTRIES], first + begin
        chunk.sub_(torch.arange(entry, entry + chunk.numel())).bitwise_left_shift_(index.low_bits)
        if index.low_bits:
            lead = entry % 8
            chunk.bitwise_or_(_unpack(index.data, index.low_bits, entry - lead, chunk.numel() + lead)[lead:])


def check(index: EncodedIndex) -> None:
    """ValueError unless the data's length, unused bits and number of set bits fit the fields; allocates little."""
    expected = num_bytes(index.codec, index.numel, index.num_active, index.low_bits)
    if index.data.dtype != torch.uint8 or index.data.dim() != 1 or index.data.numel() != expected:
        raise ValueError(
            f"expected {expected} bytes of {index.codec} index for {index.num_active} of {index.numel} entries, "
            f"got {index.data.numel()}"
        )
    if index.num_active == 0 and index.codec == ELIAS_FANO:
        return
    streams = [(index.data, index.numel)]
    if index.codec == ELIAS_FANO:
        num_low_bytes = _num_low_bytes(index.num_active, index.low_bits)
        high_bits = _num_high_bits(index.numel, index.num_active, index.low_bits)
        streams = [
            (index.data[num_low_bytes:], high_bits),
            (index.data[:num_low_bytes], index.num_active * index.low_bits),
        ]
    for stream, num_bits in streams:
        if num_bits % 8 and int(stream[-1]) >> (num_bits % 8):
            raise ValueError("expected the unused bits of the index's last byte to be 0, got a bit set")
    count = sum(
        int(torch.count_nonzero(_spread(streams[0][0][begin : begin + _CHUNK_BYTES])))
        for begin in range(0, streams[0][0].numel(), _CHUNK_BYTES)
    )
    if count != index.num_active:
        raise ValueError(f"expected {index.num_active} active entries, got an index of {count}")


@lru_cache(maxsize=4096)
def choose(numel: int, num_active: int) -> tuple[str, int]:
    """(codec, low_bits) of the fewest bytes and on a tie the bit map, then the smaller low_bits. Empty: Elias-Fano."""
    if num_active == 0:
        return ELIAS_FANO, 0
    low_bits = min(
        range(max(1, (numel - 1).bit_length() + 1)), key=lambda bits: num_bytes(ELIAS_FANO, numel, num_active, bits)
    )
    if num_bytes(BITMAP, numel, num_active, 0) <= num_bytes(ELIAS_FANO, numel, num_active, low_bits):
        return BITMAP, 0
    return ELIAS_FANO, low_bits


def num_bytes(codec: str, numel: int, num_active: int, low_bits: int) -> int:
    """Bytes of an encoded index (Python integers: no claim is too large to compare with). ValueError on bad fields."""
    if codec not in CODECS:
        raise ValueError(f"expected codec {' or '.join(CODECS)}, got {codec!r}")
    if not 0 <= num_active <= numel <= MAX_NUMEL:
        raise ValueError(f"expected 0 <= num_active <= numel <= 2**62, got num_active {num_active} and numel {numel}")
    if not 0 <= low_bits <= (MAX_LOW_BITS if codec == ELIAS_FANO else 0):
        raise ValueError(f"expected low_bits from 0 to {MAX_LOW_BITS} (0 for a bit map), got {low_bits}")
    if codec == BITMAP:
        return -(-numel // 8)
    if num_active == 0:
        return 0
    return _num_low_bytes(num_active, low_bits) - (-_num_high_bits(numel, num_active, low_bits) // 8)


def _num_low_bytes(num_active: int, low_bits: int) -> int:
    return -(-num_active * low_bits // 8)


def _num_high_bits(numel: int, num_active: int, low_bits: int) -> int:
    return num_active + ((numel - 1) >> low_bits) + 1


def _check_positions(positions: Tensor, numel: int) -> None:
    if not 0 <= numel <= MAX_NUMEL:
        raise ValueError(f"expected a tensor of at most 2**62 elements, got {numel}")
    if positions.dtype != torch.int64 or positions.dim() != 1:
        raise ValueError(
            f"positions must be a flat int64 tensor, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if positions.numel() == 0:
        return
    if not (positions[1:] > positions[:-1]).all():
        raise ValueError("positions must ascend strictly, got some that repeat or descend. Sort and deduplicate them.")
    if int(positions[0]) < 0 or int(positions[-1]) >= numel:
        raise ValueError(
            f"positions must lie in [0, {numel}), got {int(positions[0])} to {int(positions[-1])}. "
            "Positions are flat (row-major) and of the tensor's own shape."
        )


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


_BYTE_COPIES = 0x0101010101010101
_BIT_OF_BYTE = _signed(0x8040201008040201)
_COLLECT = 0x0102040810204080


def _spread(data: Tensor) -> Tensor:
    """uint8 `[8 * n]`, non-zero where bit k of the bytes `data` is set: copies of a byte, each masked to one bit."""
    return data.to(torch.int64).mul_(_BYTE_COPIES).bitwise_and_(_BIT_OF_BYTE).view(torch.uint8)


def _find_bits(data: Tensor) -> Iterator[Tensor]:
    """int64 positions of the set bits, in ascending chunks of 1 to 8 * `_CHUNK_BYTES`."""
    for begin in range(0, data.numel(), _CHUNK_BYTES):
        bits = _spread(data[begin : begin + _CHUNK_BYTES]).nonzero().squeeze(1)
        if bits.numel():
            yield bits.add_(8 * begin)


def _set_bits(positions: Tensor, num_bits: int) -> Tensor:
    """Bytes of a string of `num_bits` with the bits at ascending `positions` set."""
    data = torch.empty(-(-num_bits // 8), dtype=torch.uint8)
    edges = torch.arange(0, data.numel() + _CHUNK_BYTES, _CHUNK_BYTES)
    bounds = torch.searchsorted(positions, edges * 8).tolist()
    for chunk, begin in enumerate(range(0, data.numel(), _CHUNK_BYTES)):
        out = data[begin : begin + _CHUNK_BYTES]
        bits = torch.zeros(8 * out.numel(), dtype=torch.uint8)
        bits[positions[bounds[chunk] : bounds[chunk + 1]] - 8 * begin] = 1
        # A product that lines the eight 0/1 bytes up in the top byte; no two of its terms share a bit, so none carries.
        out.copy_((bits.view(torch.int64) * _COLLECT >> 56) & 255)
    return data


def _pack(positions: Tensor, width: int) -> Tensor:
    """The low `width` bits of every position as one bit string. Eight entries are `width` whole bytes."""
    data = torch.zeros(_num_low_bytes(positions.numel(), width), dtype=torch.uint8)
    if width == 0:
        return data
    for begin in range(0, positions.numel(), _CHUNK_ENTRIES):
        chunk = positions[begin : begin + _CHUNK_ENTRIES] & ((1 << width) - 1)
        groups = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 8)).view(-1, 8)
        rows = torch.zeros(groups.shape[0], width, dtype=torch.uint8)
        for lane in range(8):
            first, entries = lane * width, groups[:, lane]
            for byte in range(first // 8, (first + width - 1) // 8 + 1):
                shift = 8 * byte - first
                part = entries >> shift if shift >= 0 else entries << -shift
                rows[:, byte] |= (part & 255).to(torch.uint8)
        out = data[begin * width // 8 : begin * width // 8 + rows.numel()]
        out.copy_(rows.view(-1)[: out.numel()])
    return data


def _unpack(data: Tensor, width: int, begin: int, count: int) -> Tensor:
    """int64 `[count]`: entries `begin ...` of the bit string that `_pack` makes; `begin` is a multiple of 8."""
    num_groups = -(-count // 8)
    stream = data[begin * width // 8 : begin * width // 8 + _num_low_bytes(count, width)]
    if stream.numel() < num_groups * width:
        stream = torch.nn.functional.pad(stream, (0, num_groups * width - stream.numel()))
    columns = stream.view(num_groups, width).t().contiguous()
    entries = torch.empty(num_groups, 8, dtype=torch.int64)
    for lane in range(8):
        first = lane * width
        lane_bits = columns[first // 8].to(torch.int64) >> (first % 8)
        for byte in range(first // 8 + 1, (first + width - 1) // 8 + 1):
            lane_bits |= columns[byte].to(torch.int64) << (8 * byte - first)
        entries[:, lane] = lane_bits & ((1 << width) - 1)
    return entries.view(-1)[:count]

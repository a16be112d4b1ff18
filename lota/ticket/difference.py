"""New values and base values in one stream: the difference of their bits as ordered integers, a bijection both ways.

    order(u) = u              for bits u >= 0 (as a signed integer of the item's width)
             = -(u & MAX) - 1 for u < 0, MAX the largest signed integer
    d        = order(value) - order(base value)          modulo 2**width
    z        = (d << 1) ^ (d >> (width - 1))             zigzag: small differences of either sign are small
    stream   = the bytes of all z, plane by plane from the lowest byte, each plane deflated (RFC 1951, no header)

`order` ascends as the numbers do, so a small change is a small difference: 5 to 6 bits of entropy an entry where a bf16
weight was trained at a rate near 1e-5, in place of the 32 of value and base value. Whoever has the base gets the
values, whoever has the tuned model gets the base. All is modulo 2**width, so NaN, infinities and signs of zero come
back.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

CODEC = "ordered_planes_deflate"
_INTEGERS = {2: torch.int16, 4: torch.int32}
_LEVEL = 6


def encode(values: Tensor, base_values: Tensor) -> tuple[Tensor, list[int]]:
    """The stream, uint8 `[sum of sizes]`, and the bytes of its planes. values, base_values: `[n]` of one float dtype of
    2 or 4 bytes; ValueError otherwise."""
    if values.dtype != base_values.dtype or values.shape != base_values.shape or values.element_size() not in _INTEGERS:
        raise ValueError(
            f"a difference is of values of one dtype of 2 or 4 bytes, got {values.dtype} and {base_values.dtype}"
        )
    width = 8 * values.element_size()
    difference = _ordered(values).sub_(_ordered(base_values))
    zigzag = (difference << 1) ^ (difference >> (width - 1))
    planes = zigzag.view(torch.uint8).view(-1, values.element_size()).t().contiguous()
    parts = [_deflate(plane) for plane in planes]
    joined = bytearray(b"".join(parts))
    data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    return data, [len(part) for part in parts]


def decode(data: Tensor, sizes: Sequence[int], known: Tensor, *, is_base: bool) -> Tensor:
    """The values from the base's (is_base), or the base's values from the new ones: `[n]` in the dtype of `known`.

    ValueError where the stream does not give as many entries as `known` has; no more than those are ever made of it.
    """
    item = known.element_size()
    if len(sizes) != item or item not in _INTEGERS or sum(sizes) != data.numel():
        raise ValueError(f"expected a stream of {item} planes and {sum(sizes)} bytes, got {len(sizes)}, {data.numel()}")
    raw, begin = data.numpy().tobytes(), 0
    zigzag = torch.zeros(known.numel(), dtype=_INTEGERS[item])
    for number, size in enumerate(sizes):
        plane = _inflate(raw[begin : begin + size], known.numel()).to(zigzag.dtype)
        zigzag.bitwise_or_(plane.bitwise_left_shift_(8 * number))
        begin += size
    odd = (zigzag & 1).neg_()
    # A logical shift of the bits, whatever the sign.
    difference = zigzag.bitwise_right_shift_(1).bitwise_and_((1 << (8 * item - 1)) - 1).bitwise_xor_(odd)
    place = _ordered(known.cpu())
    made = place.add_(difference) if is_base else place.sub_(difference)
    return _unordered(made).view(known.dtype)


def _ordered(values: Tensor) -> Tensor:
    """The bits as integers that ascend as the numbers do; a tensor of its own."""
    bits = values.detach().cpu().contiguous().view(_INTEGERS[values.element_size()])
    return _unordered(bits)  # its own inverse


def _unordered(bits: Tensor) -> Tensor:
    # Of a negative number all bits but the sign are turned over: -(u & MAX) - 1.
    sign = bits >> (8 * bits.element_size() - 1)
    return sign.bitwise_and_(torch.iinfo(bits.dtype).max).bitwise_xor_(bits)


def _deflate(plane: Tensor) -> bytes:
    """Huffman codes alone: there is nothing to find twice in differences, and this decodes fastest."""
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    run = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
    raw = plane.numpy().tobytes()
    coded = packer.compress(raw) + packer.flush()
    if len(coded) * 4 < len(raw):  # a plane of hardly anything but zeros: runs of it are shorter still
        other = run.compress(raw) + run.flush()
        coded = min(coded, other, key=len)
    return coded


def _inflate(coded: bytes, count: int) -> Tensor:
    unpacker = zlib.decompressobj(-15)
    try:
        raw = unpacker.decompress(coded, count + 1)
    except zlib.error as error:
        raise ValueError(f"the stream is damaged: {error}") from None
    if len(raw) != count or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"expected a plane of {count} bytes, got {len(raw)} or more")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)

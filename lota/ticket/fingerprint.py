"""Fingerprints of weights: a linear 64-bit hash, so that partial fingerprints of any pieces add up.

    fingerprint = sum over positions p of  a(p) * (bits(p) + 1)   modulo 2**64
    a(p)        = A(p % 65536) * B(p // 65536)                    modulo 2**64
    A(j)        = fmix64(1 + j) | 1,    B(r) = fmix64(2**32 + r) | 1

`bits(p)` is the value's bit pattern as an unsigned integer and fmix64 is MurmurHash3's finalizer (Appleby, public
domain). Every a(p) is odd, so a change of any single entry always changes the sum; other changes go unseen with a
chance of at most about 2**-48 for 2-byte and 2**-32 for 4-byte values. It finds mistakes, not forgeries: this is no
cryptographic hash.

Linearity is the point. Ranks add the partials of what they hold, in any cut; and
`fingerprint(new) == fingerprint(old) + fingerprint_at(active, new) - fingerprint_at(active, old)` exactly when (up to
that chance) nothing else moved, so frozen entries are verified without a copy of the base.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lota.kernels import fmix64

_MODULUS = 1 << 64
_ROW = 1 << 16
_CPU_ROWS, _DEVICE_ROWS = 4, 64  # rows at a time: 2 MiB of int64 stays in a core's cache; a GPU wants larger launches
# By item size. 8 bytes stay signed: everything is modulo 2**64.
_UNSIGNED = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.int64}


def fingerprint(flat: Tensor, start: int = 0) -> int:
    """Partial fingerprint of the contiguous piece `flat` of a tensor, which begins at flat position `start`.

    flat: 1-D, of any dtype of 1 to 8 bytes (weights are bf16, fp16 or fp32, buffers also integers) on any device, not
    changed; 0 elements give 0. Returns an unsigned 64-bit integer, the
    tensor's fingerprint once the partials of all its pieces are added (`add`). At most 2**22 elements of temporaries.
    """
    bits = _bits(flat)
    if start < 0:
        raise ValueError(f"start must be a flat position, 0 or more, got {start}")
    num_elements = bits.numel()
    if num_elements == 0:
        return 0
    columns = _columns(flat.device)
    max_rows = _CPU_ROWS if flat.device.type == "cpu" else _DEVICE_ROWS
    first_row = start // _ROW
    rows = torch.arange(first_row, (start + num_elements - 1) // _ROW + 1, dtype=torch.int64, device=flat.device)
    row_sums = torch.empty_like(rows)
    full_sum = columns.sum()
    done = 0
    while done < num_elements:
        row, column = divmod(start + done, _ROW)
        if column or num_elements - done < _ROW:
            count = min(_ROW - column, num_elements - done)
            piece = bits[done : done + count].to(torch.int64, copy=True).unsqueeze(0)
            weights = columns[column : column + count]
            weights_sum = weights.sum()
        else:
            count = min(max_rows, (num_elements - done) // _ROW) * _ROW
            piece = bits[done : done + count].reshape(-1, _ROW).to(torch.int64, copy=True)
            weights, weights_sum = columns, full_sum
        # sum of A * bits, plus the sum of A for the "+ 1"
        row_sums[row - first_row : row - first_row + piece.shape[0]] = piece.mul_(weights).sum(1).add_(weights_sum)
        done += count
    return int(row_sums.mul_(_row_multiplier(rows)).sum()) % _MODULUS


def fingerprint_at(positions: Tensor, values: Tensor) -> int:
    """Partial fingerprint of the scattered entries `values[k]` at flat positions `positions[k]` of one tensor.

    positions: int64 `[n]`, in any order, 0 or more, no duplicates (not checked). values: `[n]`, any such dtype, same
    device. Same hash as `fingerprint`. At most a few times 2**22 elements of temporaries.
    """
    bits = _bits(values)
    if positions.dtype != torch.int64 or positions.shape != values.shape:
        raise ValueError(
            f"positions must be int64 of shape {tuple(values.shape)} like the values, "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    columns = _columns(values.device)
    chunk = 1 << 18 if values.device.type == "cpu" else 1 << 22
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for begin in range(0, bits.numel(), chunk):
        where = positions[begin : begin + chunk]
        partial = bits[begin : begin + chunk].to(torch.int64, copy=True).add_(1)
        total += partial.mul_(columns[where & (_ROW - 1)]).mul_(_row_multiplier(where >> 16)).sum()
    return int(total) % _MODULUS


def add(*partials: int) -> int:
    """The fingerprint of pieces together: the sum of their partials modulo 2**64 (subtract with a negative partial)."""
    return sum(partials) % _MODULUS


def to_hex(value: int) -> str:
    """A fingerprint as files hold it: 16 lower-case hex digits."""
    return f"{value % _MODULUS:016x}"


def _bits(values: Tensor) -> Tensor:
    if values.dim() != 1 or values.is_complex() or values.dtype.itemsize not in _UNSIGNED:
        raise ValueError(
            f"a fingerprint is taken of a flat tensor of numbers, got {values.dtype} of shape {tuple(values.shape)}. "
            "Pass tensor.flatten()."
        )
    return values.detach().view(_UNSIGNED[values.dtype.itemsize])


@lru_cache(maxsize=32)
def _columns(device: torch.device) -> Tensor:
    return fmix64(torch.arange(1, _ROW + 1, dtype=torch.int64, device=device)).bitwise_or_(1)


def _row_multiplier(rows: Tensor) -> Tensor:
    return fmix64(rows + (1 << 32)).bitwise_or_(1)

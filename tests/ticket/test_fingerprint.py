"""Contract: fingerprints of pieces add up whatever the cut, any single change shows, frozen entries can be verified."""

from __future__ import annotations

import itertools
import random
import struct

import pytest
import torch

from lota.ticket import add, fingerprint, fingerprint_at, to_hex

MODULUS = 2**64
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LENGTHS = [0, 1, 65535, 65536, 65537, 3 * 65536, 4 * 65536 + 1, 400_003]


def fmix64(key: int) -> int:
    key ^= key >> 33
    key = key * 0xFF51AFD7ED558CCD % MODULUS
    key ^= key >> 33
    key = key * 0xC4CEB9FE1A85EC53 % MODULUS
    return key ^ key >> 33


def oracle(bits: list[int], start: int = 0) -> int:
    """The definition in Python integers, sharing nothing with the library."""
    total = 0
    for position, value in enumerate(bits, start):
        row, column = divmod(position, 65536)
        total += (fmix64(1 + column) | 1) * (fmix64(2**32 + row) | 1) * (value + 1)
    return total % MODULUS


def random_values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bit patterns, so NaN payloads, infinities, subnormals and -0.0 are among them."""
    generator = torch.Generator().manual_seed(seed)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    return torch.randint(info.min, info.max + 1, (count,), generator=generator, dtype=integer).view(dtype)


def bits_of(values: torch.Tensor) -> list[int]:
    raw = bytes(values.view(torch.uint8).numpy())
    return list(struct.unpack(f"<{values.numel()}{'I' if values.dtype == torch.float32 else 'H'}", raw))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 1, 65535, 65536, 2**31 - 5, 2**40 + 7])
def test_agrees_with_the_definition(dtype: torch.dtype, start: int) -> None:
    for count in (0, 1, 7, 70_001):
        values = random_values(count, dtype)
        assert fingerprint(values, start) == oracle(bits_of(values), start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", LENGTHS)
def test_pieces_of_any_cut_add_up(dtype: torch.dtype, count: int) -> None:
    values = random_values(count, dtype)
    whole = fingerprint(values)
    for num_pieces in (1, 2, 3, 5, 16):
        randomly = random.Random(num_pieces)
        cuts = [0, *sorted(randomly.randrange(count + 1) for _ in range(num_pieces - 1)), count]
        partials = [fingerprint(values[begin:end], begin) for begin, end in itertools.pairwise(cuts)]
        assert add(*partials) == whole
    chosen = torch.randperm(count)
    half = count // 2
    scattered = [fingerprint_at(part, values[part]) for part in (chosen[:half], chosen[half:])]
    assert add(*scattered) == whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_or_two_swapped_entries_change_it(dtype: torch.dtype) -> None:
    values = random_values(70_000, dtype)
    before = fingerprint(values)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    for position in (0, 1, 65535, 65536, 69_999):
        for bit in range(8 * values.element_size()):
            changed = values.clone()
            flip = torch.tensor(1, dtype=torch.int64) << bit
            changed.view(integer)[position] ^= flip.to(torch.int32).to(integer)
            assert fingerprint(changed) != before
    for one, other in ((0, 1), (5, 65_541), (65_535, 65_536), (1, 69_999)):
        changed = values.clone()
        changed[[one, other]] = changed[[other, one]]
        assert not torch.equal(changed.view(integer), values.view(integer))
        assert fingerprint(changed) != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_entries_are_verified_without_the_base(dtype: torch.dtype) -> None:
    base = random_values(200_000, dtype)
    active = torch.randperm(200_000)[:20_000].sort().values
    tuned = base.clone()
    tuned[active] = random_values(20_000, dtype, seed=1)
    expected = add(fingerprint(base), fingerprint_at(active, tuned[active]), -fingerprint_at(active, base[active]))
    assert fingerprint(tuned) == expected
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    tuned.view(integer)[int(torch.tensor(sorted(set(range(100)) - set(active.tolist())))[0])] ^= 1
    assert fingerprint(tuned) != expected


def test_dtypes_zeros_and_lengths_differ() -> None:
    """All-zero tensors of another length differ, and -0.0 is not 0.0."""
    assert fingerprint(torch.zeros(5)) != fingerprint(torch.zeros(6))
    assert fingerprint(torch.zeros(5)) != fingerprint(-torch.zeros(5))
    assert fingerprint(torch.zeros(0)) == 0


def test_strided_and_requiring_grad_is_fine_and_nothing_is_changed() -> None:
    values = torch.randn(200_000, requires_grad=True)
    copy = values.detach().clone()
    assert fingerprint(values[::2]) == fingerprint(copy[::2].contiguous())
    assert torch.equal(values, copy)


def test_hex_and_messages() -> None:
    assert to_hex(255) == "00000000000000ff"
    with pytest.raises(ValueError, match=r"flat tensor of numbers, got torch.complex64"):
        fingerprint(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"Pass tensor.flatten"):
        fingerprint(torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"start must be"):
        fingerprint(torch.zeros(3), -1)
    with pytest.raises(ValueError, match=r"positions must be int64"):
        fingerprint_at(torch.zeros(3, dtype=torch.int32), torch.zeros(3))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.float64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
def test_buffers_of_every_dtype_have_one_and_keep_their_values(dtype: torch.dtype) -> None:
    """Pieces add up, one changed entry shows, and the tensor is only read."""
    values = (torch.arange(200_000) % 100).to(dtype)
    before = values.clone()
    whole = fingerprint(values)
    assert add(fingerprint(values[:70_001]), fingerprint(values[70_001:], 70_001)) == whole
    positions = torch.arange(200_000)
    assert fingerprint_at(positions, values) == whole
    assert torch.equal(values, before)
    values[131_072] = ~values[131_072] if dtype == torch.bool else values[131_072] + 1
    assert fingerprint(values) != whole

"""Contract: decode(encode(positions)) == positions for every tensor, the smallest code is chosen, lies are refused."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from lota.ticket.codec import BITMAP, ELIAS_FANO, EncodedIndex, choose, decode, decode_chunks, encode, num_bytes

EDGES = [1, 2, 7, 8, 9, 63, 64, 65, 1023, 1024, 1025, 4096]


def random_positions(numel: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(numel, generator=generator) < density).nonzero().squeeze(1)


def oracle_bytes(positions: list[int], numel: int, low_bits: int) -> bytes:
    """Elias-Fano written bit by bit from its definition."""
    low, high = 0, 0
    for i, position in enumerate(positions):
        low |= (position & ((1 << low_bits) - 1)) << (i * low_bits)
        high |= 1 << ((position >> low_bits) + i)
    num_high_bits = len(positions) + ((numel - 1) >> low_bits) + 1
    return low.to_bytes(math.ceil(len(positions) * low_bits / 8), "little") + high.to_bytes(
        math.ceil(num_high_bits / 8), "little"
    )


@pytest.mark.parametrize("numel", EDGES)
@pytest.mark.parametrize("density", [0.001, 0.01, 0.1, 0.3, 0.9])
def test_round_trip(numel: int, density: float) -> None:
    positions = random_positions(numel, density)
    index = encode(positions, numel)
    assert torch.equal(decode(index), positions)
    assert decode(index).dtype == torch.int64


@pytest.mark.parametrize("numel", [0, 1, 5, 8, 1000])
def test_empty_and_all_active(numel: int) -> None:
    for positions in (torch.empty(0, dtype=torch.int64), torch.arange(numel)):
        index = encode(positions, numel)
        assert torch.equal(decode(index), positions)
        assert index.data.numel() <= -(-numel // 8)


@pytest.mark.parametrize("seed", range(20))
def test_elias_fano_is_the_code_of_the_definition(seed: int) -> None:
    numel = 50 + 97 * seed
    positions = random_positions(numel, 0.05, seed)
    index = encode(positions, numel)
    if index.num_active:
        assert index.codec == ELIAS_FANO
        assert bytes(index.data.numpy()) == oracle_bytes(positions.tolist(), numel, index.low_bits)


@pytest.mark.parametrize("low_bits", [0, 1, 5, 8, 9, 31, 32, 33, 55, 57, 61, 62])
def test_every_low_bits_that_a_file_may_hold_decodes(low_bits: int) -> None:
    numel = max(1 << low_bits, 2) if low_bits > 20 else 3000
    positions = sorted({0, 1, numel // 3, numel // 2, numel - 2, numel - 1} | {numel * k // 11 for k in range(11)})
    data = torch.frombuffer(bytearray(oracle_bytes(positions, numel, low_bits)), dtype=torch.uint8)
    index = EncodedIndex(ELIAS_FANO, numel, len(positions), low_bits, data)
    assert decode(index).tolist() == positions


@pytest.mark.parametrize("numel", [2**31 + 5, 2**33, 2**40 + 1, 2**62])
def test_positions_beyond_31_bits_with_few_entries(numel: int) -> None:
    positions = torch.tensor([0, 2**31 - 1, 2**31, numel // 2 + 3 if numel > 2**32 else 2**31 + 1, numel - 1])
    index = encode(positions, numel)
    assert torch.equal(decode(index), positions)
    assert index.data.numel() < 60


def test_chunk_borders() -> None:
    """Entries and bytes are worked through in chunks: sizes around their borders, dense runs and long gaps."""
    for count in (2**18 - 1, 2**18, 2**18 + 1, 2**19 + 7):
        positions = torch.arange(count) * 37 + (torch.arange(count) % 29)
        for numel in (int(positions[-1]) + 1, int(positions[-1]) + 2**24):
            assert torch.equal(decode(encode(positions, numel)), positions)
    mixed = torch.cat([torch.arange(300_000), torch.arange(300_000) * 1000 + 10**9])
    assert torch.equal(decode(encode(mixed, 2 * 10**9)), mixed)


@pytest.mark.parametrize(
    ("numel", "density", "num_chunks"),
    [(0, 0.0, 0), (5000, 0.0, 0), (5000, 0.3, 1), (9_000_000, 0.3, 9), (30_000_000, 0.03, 2)],
)
def test_chunks_are_the_positions(numel: int, density: float, num_chunks: int) -> None:
    """Both codecs; chunks do not end at whole bytes of low bits. One that is changed changes no other."""
    positions = random_positions(numel, density)
    found = []
    for chunk in decode_chunks(encode(positions, numel)):
        assert 0 < chunk.numel() <= 1 << 20
        found.append(chunk.clone())
        chunk.fill_(-1)
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *found]), positions)
    assert len(found) == num_chunks and not (num_chunks == 2 and found[0].numel() % 8 == 0)


def test_the_smallest_code_is_chosen() -> None:
    for numel in (1, 10, 1000, 10**6):
        for num_active in sorted({1, numel // 100, numel // 10, numel // 5, numel // 2, numel} - {0}):
            sizes = [num_bytes(ELIAS_FANO, numel, num_active, bits) for bits in range(63)]
            codec, low_bits = choose(numel, num_active)
            assert num_bytes(codec, numel, num_active, low_bits) == min(*sizes, num_bytes(BITMAP, numel, num_active, 0))


def test_decoding_is_vectorised() -> None:
    """10M entries take about 0.3 s on one core; a loop over entries would take minutes."""
    positions = random_positions(20_000_000, 0.1)
    index = encode(positions, 20_000_000)
    begin = time.perf_counter()
    assert torch.equal(decode(index), positions)
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([3, 3], "ascend strictly"),
        ([5, 2], "ascend strictly"),
        ([-1, 2], r"lie in \[0, 10\), got -1 to 2"),
        ([2, 10], r"lie in \[0, 10\), got 2 to 10"),
    ],
)
def test_encode_refuses(positions: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(torch.tensor(positions), 10)
    with pytest.raises(ValueError, match=r"flat int64"):
        encode(torch.tensor(positions, dtype=torch.int32), 10)


def elias_fano(positions: list[int], numel: int, low_bits: int) -> EncodedIndex:
    data = torch.frombuffer(bytearray(oracle_bytes(positions, numel, low_bits)), dtype=torch.uint8)
    return EncodedIndex(ELIAS_FANO, numel, len(positions), low_bits, data)


def test_decode_refuses_what_is_no_index() -> None:
    # the definition itself writes these bytes: low bits descend inside one bucket, or repeat
    for positions in ([1, 6, 5, 40], [1, 6, 6, 40]):
        with pytest.raises(ValueError, match=r"repeat or descend"):
            decode(elias_fano(positions, 64, 3))
    with pytest.raises(ValueError, match=r"below 61, got 63"):
        decode(elias_fano([1, 63], 61, 3))
    good = encode(torch.tensor([1, 6, 40]), 64)
    for change, message in [
        ({"num_active": 9}, "bytes of elias_fano index for 9 of 64 entries"),
        ({"num_active": 2}, "index for 2 of 64 entries|expected 2 active entries, got an index of 3"),
        ({"numel": 2**60, "num_active": 2**59}, "expected [0-9]+ bytes"),
        ({"codec": "rice"}, "expected codec elias_fano or bitmap, got 'rice'"),
        ({"low_bits": 63}, "expected low_bits from 0 to 62"),
        ({"low_bits": -1}, "expected low_bits from 0 to 62"),
        ({"num_active": 65}, "num_active 65 and numel 64"),
        ({"num_active": -1}, "num_active -1"),
        ({"numel": 2**63}, "<= 2\\*\\*62"),
        ({"data": good.data[:-1]}, "expected [0-9]+ bytes of elias_fano index for 3 of 64 entries"),
        ({"data": good.data.flip(0).bitwise_not()}, "unused bits|active entries"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode(dataclasses.replace(good, **change))
    bitmap = EncodedIndex(BITMAP, 5, 1, 0, torch.tensor([0b100000], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"unused bits"):
        decode(bitmap)

"""Moved data keeps its bits, sums are exact in fp32, the index finds every position, and wrong inputs are refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from lota.kernels import TILE, TileIndex, exchange_, gather, gather_add_, mask_op, popcount, scatter_, scatter_add_

COUNTS = [0, 1, TILE - 1, TILE, TILE + 1, 70_000]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _positions(num_active: int, numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:num_active].sort().values


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _random_bits(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern, NaN payloads and negative zeros included."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (numel,), generator=generator, dtype=torch.int64).to(torch.int32)
    return words.view(torch.float32) if dtype == torch.float32 else words.to(torch.int16).view(dtype)


@pytest.mark.parametrize("num_active", COUNTS)
@pytest.mark.parametrize("spread", [1, 3, 200])
def test_index_round_trip(num_active, spread):
    numel = num_active * spread + 5
    positions = _positions(num_active, numel)
    index = TileIndex.from_flat(positions, numel)
    assert torch.equal(index.positions(), positions)
    assert index.offset.dtype == (torch.int32 if spread == 200 and num_active > 600 else torch.int16)
    for start, stop in ((0, 0), (num_active // 3, num_active // 2), (num_active // 2, num_active)):
        assert torch.equal(index.positions(start, stop), positions[start:stop])


@pytest.mark.parametrize("cuts", [[], [5], [TILE], [1, 2, 3, TILE + 1], [2 * TILE - 1, 2 * TILE]])
def test_index_from_pieces_does_not_depend_on_the_cut(cuts):
    positions = _positions(3 * TILE + 11, 100_000)
    edges = [0, *cuts, positions.numel()]
    pieces = [positions[a:b] for a, b in itertools.pairwise(edges)]
    whole, cut = (
        TileIndex.from_flat(positions, 100_000),
        TileIndex.from_pieces(pieces, positions.numel(), 100_000, "cpu"),
    )
    assert torch.equal(whole.base, cut.base)
    assert torch.equal(whole.offset, cut.offset)


def test_index_beyond_two_to_the_31():
    positions = torch.cat([torch.arange(0, 3 * TILE, 3), torch.arange(TILE) * 5 + 2**33])
    index = TileIndex.from_flat(positions, 2**34)
    assert torch.equal(index.positions(), positions)


def test_index_bytes():
    dense, thin = _positions(100 * TILE, 1_000_000), _positions(10 * TILE, 1_000_000)
    assert TileIndex.from_flat(dense, 1_000_000).nbytes == 100 * (2 * TILE + 8)
    assert TileIndex.from_flat(thin, 1_000_000).nbytes == 10 * (4 * TILE + 8)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([3, 3], "ascend"),
        ([3, 2], "ascend"),
        ([-1, 2], "ascend"),
        ([1, 9], "outside the space of 9"),
        ([[1]], "flat int64"),
    ],
)
def test_index_refuses(positions, message):
    with pytest.raises(ValueError, match=message):
        TileIndex.from_flat(torch.tensor(positions), 9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
def test_gather_scatter_exchange_move_bits(num_active, dtype):
    numel = 4 * num_active + 3
    positions = _positions(num_active, numel)
    index = TileIndex.from_flat(positions, numel)
    dense, values = _random_bits(numel, dtype, 1), _random_bits(num_active, dtype, 2)

    gathered = gather(dense, index, out=torch.empty(num_active, dtype=dtype))
    assert torch.equal(_bits(gathered), _bits(dense[positions]))

    scattered = scatter_(dense.clone(), index, values)
    expected = dense.clone()
    _bits(expected)[positions] = _bits(values)
    assert torch.equal(_bits(scattered), _bits(expected))

    swapped, carried = dense.clone(), values.clone()
    exchange_(swapped, index, carried)
    assert torch.equal(_bits(swapped), _bits(expected))
    assert torch.equal(_bits(carried), _bits(dense[positions]))
    exchange_(swapped, index, carried)
    assert torch.equal(_bits(swapped), _bits(dense))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_add_accumulates_in_fp32_over_a_span(dtype):
    positions = _positions(5000, 40_000)
    index = TileIndex.from_flat(positions, 40_000)
    origin, stop = 10_000, 30_000
    first, last = int((positions < origin).sum()), int((positions < stop).sum())
    piece = torch.randn(stop - origin).to(dtype)
    total, scale = torch.randn(last - first), torch.tensor(0.3)
    expected = total + piece[positions[first:last] - origin].float() * scale
    gather_add_(total, piece, index, scale=scale, start=first, stop=last, origin=origin)
    assert torch.equal(total, expected)


def test_scatter_add_saves_what_scatter_restores():
    positions = _positions(3000, 10_000)
    index = TileIndex.from_flat(positions, 10_000)
    weights = torch.randn(10_000).to(torch.bfloat16)
    before, saved = weights.clone(), torch.empty(3000, dtype=torch.bfloat16)
    scatter_add_(weights, index, torch.randn(3000), alpha=torch.tensor(0.5), saved=saved)
    assert not torch.equal(weights, before)
    assert torch.equal(scatter_(weights, index, saved), before)


def test_mask_algebra():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**31), 2**31, (1000,), generator=generator).to(torch.int32) for _ in range(2))
    python = {
        "and": lambda x, y: x & y,
        "andnot": lambda x, y: x & ~y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
    }
    for op, function in python.items():
        words = [function(x, y) & 0xFFFFFFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        result = mask_op(a, b, op)
        assert [word & 0xFFFFFFFF for word in result.tolist()] == words
        assert int(popcount(result)) == sum(word.bit_count() for word in words)


def test_wrong_inputs_are_refused():
    index = TileIndex.from_flat(torch.arange(0, 20, 2), 20)
    dense = torch.zeros(20)
    with pytest.raises(ValueError, match="19 elements, its index describes 20"):
        scatter_(dense[:19], index, torch.zeros(10))
    with pytest.raises(ValueError, match="needs 10 entries, got 9"):
        scatter_(dense, index, torch.zeros(9))
    with pytest.raises(ValueError, match="flat contiguous"):
        scatter_(torch.zeros(40)[::2], index, torch.zeros(10))
    with pytest.raises(ValueError, match="flat contiguous"):
        scatter_(dense.long(), index, torch.zeros(10))
    with pytest.raises(ValueError, match="exchange_ moves bits"):
        exchange_(dense, index, torch.zeros(10, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="op must be one of"):
        mask_op(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), "nand")

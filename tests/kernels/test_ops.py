"""Moved data keeps its bits, sums are exact in fp32, the index finds every position, and wrong inputs are refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lota.kernels import (
    TILE,
    Pull,
    TileIndex,
    adamw_,
    exchange_,
    gather,
    gather_add_,
    mask_op,
    padded_zeros,
    popcount,
    pull_,
    pull_rate,
    rmsprop_,
    scatter_,
    scatter_add_,
    squared_norm,
)
from lota.ticket.codec import decode, encode

COUNTS = [0, 1, TILE - 1, TILE, TILE + 1, 70_000]
GUARD = 16
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


def test_the_range_check_can_be_switched_off_and_no_other():
    """The tensor's own length must fit all the same."""
    index = TileIndex.from_flat(torch.tensor([-1, 2, 9]), 9, check_range=False)
    assert index.positions().tolist() == [-1, 2, 9] and index.numel == 9
    words = torch.tensor([-(2**31)], dtype=torch.int32)
    assert TileIndex.from_words(words, 31, check_range=False).positions().tolist() == [31]
    for positions, message in (
        ([3, 3], "ascend"),
        ([3, 2], "ascend"),
        ([[1]], "flat int64"),
        ([0, 2**31], "2\\*\\*31"),
    ):
        with pytest.raises(ValueError, match=message):
            TileIndex.from_flat(torch.tensor(positions), 9, check_range=False)
    pieces = [torch.tensor([1, 5]), torch.tensor([5])]
    with pytest.raises(ValueError, match="ascend"):
        TileIndex.from_pieces(pieces, 3, 9, "cpu", check_range=False)
    with pytest.raises(ValueError, match="expected 4 positions, got 2"):
        TileIndex.from_pieces(pieces[:1], 4, 9, "cpu", check_range=False)
    with pytest.raises(ValueError, match="8 elements, its index describes 9"):
        scatter_(torch.zeros(8), index, torch.zeros(3))


def _same(one: TileIndex, other: TileIndex) -> bool:
    numbers = one.numel == other.numel and one.num_active == other.num_active
    return numbers and torch.equal(one.base, other.base) and torch.equal(one.offset, other.offset)


@pytest.mark.parametrize("numel", [0, 1, 31, 32, 33, 5000, 1_100_000])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6, 1.0])
def test_index_from_bit_words(density, numel):
    """And from the bytes of a ticket's bit map. Above 1,048,576 positions words are spread out in two pieces."""
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(0)) < density
    positions = mask.nonzero().flatten()
    bytes_ = np.packbits(mask.numpy(), bitorder="little")
    words = torch.from_numpy(np.pad(bytes_, (0, -len(bytes_) % 4)).view(np.int32))
    assert _same(TileIndex.from_words(words, numel), TileIndex.from_flat(positions, numel))
    encoded = encode(positions, numel)
    assert _same(TileIndex.from_flat(decode(encoded), numel), TileIndex.from_flat(positions, numel))
    if encoded.codec == "bitmap":
        viewed = torch.nn.functional.pad(encoded.data, (0, -encoded.data.numel() % 4)).view(torch.int32)
        assert torch.equal(viewed, words)


def test_index_from_words_refuses():
    with pytest.raises(ValueError, match=r"int32 of shape \(2,\) for 33 elements, got torch.int32 of shape \(1,\)"):
        TileIndex.from_words(torch.zeros(1, dtype=torch.int32), 33)
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        TileIndex.from_words(torch.zeros(2, dtype=torch.int64), 33)
    with pytest.raises(ValueError, match=r"strides \(2,\)"):
        TileIndex.from_words(torch.zeros(4, dtype=torch.int32)[::2], 33)
    with pytest.raises(ValueError, match="position 33 lies outside the space of 33"):
        TileIndex.from_words(torch.tensor([0, 2], dtype=torch.int32), 33)


@pytest.mark.parametrize("spread", [1, 3, 200])
@pytest.mark.parametrize("num_active", [0, 1, TILE, TILE + 1, 5 * TILE + 9])
def test_index_sliced_to_partitions(num_active, spread):
    """Pieces that are cut inside tiles, at the first element, at active entries and behind the last, and empty ones."""
    numel = num_active * spread + 5
    positions = _positions(num_active, numel)
    index = TileIndex.from_flat(positions, numel)
    edges = [0, 0, *positions[[0, num_active // 2, -1]].tolist(), numel, numel] if num_active else [0, numel]
    for size in (2, 3, 8, 16):
        width = -(-numel // size)
        edges += [min(rank * width, numel) for rank in range(size)]
    for start, stop in itertools.pairwise(sorted(edges)):
        inside = positions[(positions >= start) & (positions < stop)] - start
        assert _same(index.slice(start, stop), TileIndex.from_flat(inside, stop - start)), (start, stop)
    for start, stop in ((-1, 3), (3, 2), (0, numel + 1)):
        with pytest.raises(ValueError, match="lie outside the index's space"):
            index.slice(start, stop)


@pytest.mark.parametrize("num_active", [0, 1, TILE, 3 * TILE + 9])
def test_entries_before_positions(num_active):
    """As many as are below it: before the first entry, at entries and between them, behind the last."""
    numel = 7 * num_active + 5
    positions = _positions(num_active, numel)
    index = TileIndex.from_flat(positions, numel)
    asked = torch.cat([torch.tensor([numel, 0]), torch.arange(0, numel, 13), positions[::5]])
    assert torch.equal(index.entries_before(asked), torch.searchsorted(positions, asked))
    assert index.entries_before(asked[:0]).numel() == 0


def _guarded(tensor: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy between two bands of a known pattern, and the whole buffer."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), -7.0, dtype=tensor.dtype, device=device)
    view = buffer[GUARD : GUARD + tensor.numel()]
    view.copy_(tensor)
    return view, buffer


def _assert_guards_hold(buffer: torch.Tensor) -> None:
    assert (buffer[:GUARD] == -7).all() and (buffer[-GUARD:] == -7).all(), "written out of bounds"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
def test_gather_scatter_exchange_move_bits(device, num_active, dtype):
    numel = 4 * num_active + 3
    positions = _positions(num_active, numel)
    index = TileIndex.from_flat(positions.to(device), numel)
    dense, values = _random_bits(numel, dtype, 1), _random_bits(num_active, dtype, 2)
    expected = dense.clone()
    _bits(expected)[positions] = _bits(values)

    out, out_buffer = _guarded(torch.zeros(num_active, dtype=dtype), device)
    gather(dense.to(device), index, out=out)
    assert torch.equal(_bits(out).cpu(), _bits(dense)[positions])

    target, target_buffer = _guarded(dense, device)
    scatter_(target, index, values.to(device))
    assert torch.equal(_bits(target).cpu(), _bits(expected))

    target.copy_(dense)
    carried, carried_buffer = _guarded(values, device)
    exchange_(target, index, carried)
    assert torch.equal(_bits(target).cpu(), _bits(expected))
    assert torch.equal(_bits(carried).cpu(), _bits(dense)[positions])
    exchange_(target, index, carried)
    assert torch.equal(_bits(target).cpu(), _bits(dense))
    assert torch.equal(_bits(carried).cpu(), _bits(values))
    for buffer in (out_buffer, target_buffer, carried_buffer):
        _assert_guards_hold(buffer)


@pytest.mark.parametrize("spread", [2, 300])
@pytest.mark.parametrize("source_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_gather_casts_scales_and_accumulates_in_fp32_over_a_span(device, source_dtype, out_dtype, spread):
    """Spans that begin and end in the middle of tiles, at their edges, and hold nothing."""
    count = 3 * TILE + 77
    positions = _positions(count, spread * count)
    index = TileIndex.from_flat(positions.to(device), spread * count)
    generator, scale = torch.Generator().manual_seed(3), torch.tensor(0.3)
    for start, stop in ((0, count), (0, TILE), (TILE, 3 * TILE), (700, 700), (700, 2 * TILE + 1), (3 * TILE, count)):
        origin = int(positions[start]) - 1 if start else 0
        source = torch.randn(spread * count - origin, generator=generator).to(source_dtype)
        total = torch.randn(stop - start, generator=generator).to(out_dtype)
        read = source[positions[start:stop] - origin].float()
        expected = {
            gather: (read * scale).to(out_dtype),
            gather_add_: (total.float() + read * scale).to(out_dtype),
        }
        for operation, result in expected.items():
            out, buffer = _guarded(total, device)
            options = {"out": out} if operation is gather else {}
            place = () if operation is gather else (out,)
            operation(
                *place,
                source.to(device),
                index,
                scale=scale.to(device),
                start=start,
                stop=stop,
                origin=origin,
                **options,
            )
            assert torch.equal(out.cpu(), result), (operation, start, stop)
            _assert_guards_hold(buffer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_add_squares_what_it_wrote(device, dtype):
    """One sum for each tile that the span touches, the same on every call; what is not finite stays in its tile."""
    count = 70 * TILE + 77
    positions = _positions(count, 2 * count)
    index = TileIndex.from_flat(positions.to(device), 2 * count)
    source = torch.randn(2 * count, generator=torch.Generator().manual_seed(3)).bfloat16()
    source[positions[5 * TILE + 3]] = float("inf")
    for start, stop in ((0, count), (0, TILE), (TILE, 3 * TILE), (700, 700), (700, 701), (700, 2 * TILE + 1)):
        num_tiles = -(-stop // TILE) - start // TILE if stop > start else 0
        total = torch.randn(stop - start, generator=torch.Generator().manual_seed(4)).to(dtype)
        outs = []
        for _ in range(2):
            out, squares = total.to(device, copy=True), torch.full((num_tiles + 2,), -7.0, device=device)
            options = {"start": start, "stop": stop, "squares": squares[1:-1]}
            gather_add_(out, source.to(device), index, **options)
            outs.append((out.cpu(), squares.cpu()))
        (out, squares), (_, again) = outs
        assert torch.equal(out, (total.float() + source[positions[start:stop]].float()).to(dtype))
        assert torch.equal(squares, again) and squares[0] == squares[-1] == -7
        for number in range(num_tiles):
            tile = start // TILE + number
            written = out[max(tile * TILE - start, 0) : (tile + 1) * TILE - start].double()
            # Squares are exact in float64 and summed there; one rounding to fp32 remains.
            assert float(squares[1 + number]) == pytest.approx(float((written**2).sum()), rel=2**-23)
            assert bool(squares[1 + number].isinf()) == (start <= 5 * TILE + 3 < stop and tile == 5)


def test_positions_beyond_two_to_the_31(device):
    """The dense tensors are virtual memory of which a few pages are touched."""
    numel = 2**31 + 5_000_000
    positions = torch.cat([torch.arange(0, 3000, 3), 2**31 - 1500 + torch.arange(0, 3000, 3)])
    positions = torch.cat([positions, torch.arange(numel - 1000, numel)])
    index = TileIndex.from_flat(positions.to(device), numel)
    dense = torch.empty(numel, dtype=torch.bfloat16, device=device)
    between = torch.cat([positions[:2000] + 1, positions[:1] + 1])
    dense[between.to(device)] = 1.0
    values = torch.randn(positions.numel()).bfloat16()
    scatter_(dense, index, values.to(device))
    assert torch.equal(dense[positions.to(device)].cpu(), values)
    assert torch.equal(gather(dense, index).cpu(), values.float())
    assert (dense[between.to(device)] == 1).all(), "neighbours keep their values"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.bfloat16])
def test_scatter_add_saves_what_scatter_restores(device, dtype, delta_dtype):
    count = 2 * TILE + 5
    positions = _positions(count, 10_000)
    index = TileIndex.from_flat(positions.to(device), 10_000)
    before, delta, alpha = torch.randn(10_000).to(dtype), torch.randn(count).to(delta_dtype), torch.tensor(0.5)
    expected = before.clone()
    expected[positions] = (before[positions].float() + delta.float() * alpha).to(dtype)
    weights, buffer = _guarded(before, device)
    saved, saved_buffer = _guarded(torch.zeros(count, dtype=dtype), device)
    scatter_add_(weights, index, delta.to(device), alpha=alpha.to(device), saved=saved)
    assert torch.equal(weights.cpu(), expected)
    assert torch.equal(scatter_(weights, index, saved).cpu(), before)
    assert torch.equal(scatter_add_(weights, index, delta.to(device), alpha=alpha.to(device)).cpu(), expected), (
        "saving is optional"
    )
    _assert_guards_hold(buffer)
    _assert_guards_hold(saved_buffer)


@pytest.mark.parametrize("numel", [0, 1, 1000, 4096, 4097])
def test_mask_algebra(device, numel):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-(2**31), 2**31, (numel,), generator=generator).to(torch.int32) for _ in range(2))
    python = {
        "and": lambda x, y: x & y,
        "andnot": lambda x, y: x & ~y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
    }
    for op, function in python.items():
        words = [function(x, y) & 0xFFFFFFFF for x, y in zip(a.tolist(), b.tolist(), strict=True)]
        result = mask_op(a.to(device), b.to(device), op)
        assert [word & 0xFFFFFFFF for word in result.tolist()] == words
        assert int(popcount(result)) == sum(word.bit_count() for word in words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [0, 1, 4095, 4097, 70_000])
def test_squared_norm_is_a_float64_sum(device, numel, dtype):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = squared_norm(values.to(device))
    # Squares are exact in float64; only the order of 70,000 additions differs.
    assert norm.dtype == torch.float64
    assert float(norm) == pytest.approx(float((values.double() ** 2).sum()), rel=1e-13)


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
    for squares, got in ((torch.zeros(2), r"float32 of shape \(2,\)"), (torch.zeros(1).half(), "float16")):
        with pytest.raises(
            ValueError, match=r"squares must be fp32 with one value for each of 1 tiles, got torch." + got
        ):
            gather_add_(torch.zeros(10), dense, index, squares=squares)
    with pytest.raises(ValueError, match="op must be one of"):
        mask_op(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), "nand")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"old": torch.zeros(TILE - 1)}, r"pull\.old needs 1024 entries, got 1023"),
        ({"old": torch.zeros(TILE).double()}, r"pull\.old must be a flat contiguous bf16, fp16 or fp32"),
        ({"old": torch.zeros(2 * TILE)[::2]}, r"pull\.old must be a flat contiguous"),
        ({"old": torch.zeros(TILE, device="meta")}, r"pull\.old must be .* on cpu, got .* on meta"),
        ({"importance": torch.zeros(TILE - 1)}, r"pull\.importance needs 1024 entries, got 1023"),
        ({"importance": torch.zeros(TILE).half()}, r"pull\.importance must be bf16 or fp32, got torch\.float16"),
        ({"rate": torch.zeros(2)}, r"pull\.rate must be one fp32 value on cpu, got torch\.float32 of shape \(2,\)"),
        ({"rate": torch.zeros(1).double()}, r"pull\.rate must be one fp32 value on cpu, got torch\.float64"),
    ],
)
def test_a_wrong_pull_is_refused(changed, message):
    index = TileIndex.from_flat(torch.arange(0, 20, 2), 20)
    state = [padded_zeros(index) for _ in range(4)]
    pull = Pull(torch.zeros(TILE), torch.zeros(TILE), torch.zeros(()))._replace(**changed)
    with pytest.raises(ValueError, match=message):
        adamw_(torch.zeros(20), state[0], index, *state[1:], torch.zeros(5), beta1=0.9, beta2=0.9, eps=1e-8, pull=pull)
    with pytest.raises(ValueError, match=message):
        rmsprop_(torch.zeros(20), state[0], index, *state[1:3], torch.zeros(4), alpha=0.9, eps=1e-8, pull=pull)
    with pytest.raises(ValueError, match=message):
        pull_(state[0], pull)


def test_a_wrong_call_of_the_pull_alone_is_refused():
    pull = Pull(torch.zeros(5), torch.zeros(5), torch.zeros(()))
    with pytest.raises(ValueError, match=r"pull\.old needs 4 entries, got 5"):
        pull_(torch.zeros(4), pull)
    with pytest.raises(ValueError, match=r"master must be fp32, got torch\.bfloat16"):
        pull_(torch.zeros(5).bfloat16(), pull)
    with pytest.raises(ValueError, match=r"skip must be one value on cpu, got shape \(2,\)"):
        pull_(torch.zeros(5), pull, torch.zeros(2))
    with pytest.raises(ValueError, match=r"mu must be in \[0, inf\), got -1"):
        pull_rate(torch.device("cpu"), lr=1e-3, mu=-1.0)

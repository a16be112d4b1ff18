"""Building an index or the compact state takes a chunk of a fixed size beside what is held, whatever the number of
entries and however they are cut into tensors; and gives what is built from all positions at once.

Masks here have 20 times the entries of a chunk, or 10: 8 bytes for each of them would be five or two times what is
allowed.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from lota.kernels import CHUNK, TILE, TileIndex, TileSpans, gather, padded_zeros
from lota.ticket import Mask
from lota.zero.compact.layout import owner_counts
from lota.zero.compact.mask_counts import mask_counts
from lota.zero.compact.state import CompactState
from tests.counting import Peak

# A few int64 for each entry of a chunk of positions: the decoder's, its copy with low bits, distances.
CHUNK_BYTES = 4 * 8 * CHUNK
GAP = 10


def _mask(numels: list[int], gap: int = GAP) -> Mask:
    """Gaps of 1 to 2 * gap - 1, so `1 / gap` of the entries, but for the last tensor's end."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 2 * gap, (max(numels) // gap,), generator=generator).cumsum(0)
    rows = ((str(number), (numel,), drawn[drawn < numel]) for number, numel in enumerate(numels))
    return Mask.from_indices(rows)


@pytest.fixture(scope="module")
def huge() -> Mask:
    return _mask([20 * GAP * CHUNK])


@pytest.fixture(scope="module")
def many() -> Mask:
    return _mask([1_000_000 + 37 * number for number in range(100)])


def _pieces(mask: Mask):
    origins = itertools.accumulate((mask.numel(name) for name in mask.names), initial=0)
    return (chunk + origin for name, origin in zip(mask.names, origins) for chunk in mask.chunks(name))


def _counted(build):
    """What `build` makes, and the bytes that it took beyond what is held afterwards."""
    with Peak() as peak:
        made = build()
        return made, peak.most - peak.nbytes()


@pytest.mark.parametrize("which", ["huge", "many"])
def test_an_index_takes_a_chunk_beside_itself(request, which):
    mask = request.getfixturevalue(which)
    index, extra = _counted(lambda: TileIndex.from_pieces(_pieces(mask), mask.num_active, mask.eligible, "cpu"))
    assert index.offset.dtype == torch.int16 and index.num_active == mask.num_active
    assert extra <= CHUNK_BYTES
    assert index.nbytes + extra <= 3 * mask.num_active + CHUNK_BYTES
    flat = torch.cat(list(_pieces(mask)))
    assert torch.equal(index.base, flat[::TILE])
    assert all(torch.equal(chunk, part) for chunk, part in zip(index.chunks(), flat.split(CHUNK), strict=True))
    whole, extra = _counted(lambda: TileIndex.from_flat(flat, mask.eligible))
    assert torch.equal(whole.base, index.base) and torch.equal(whole.offset, index.offset)
    assert extra <= CHUNK_BYTES
    part, extra = _counted(lambda: index.slice(mask.eligible // 5, mask.eligible))
    assert extra <= CHUNK_BYTES and 0.75 < part.num_active / index.num_active < 0.85


def test_from_words_takes_a_chunk_beside_itself():
    words = torch.full((10 * CHUNK,), 0b1001, dtype=torch.int32)
    index, extra = _counted(lambda: TileIndex.from_words(words, 32 * words.numel()))
    assert index.num_active == 20 * CHUNK and extra <= CHUNK_BYTES


@pytest.mark.parametrize("is_told", [False, True])
def test_offsets_that_become_wide(is_told):
    """At the end of 8 million narrow entries a tile spans too much: told so, the index takes 4 bytes an entry at once;
    else 2 bytes more for a moment, never both indices and a copy."""
    flat = torch.arange(8 * CHUNK)
    flat[-TILE // 2 :] += 1 << 16
    spans = TileSpans()
    for begin in range(0, flat.numel(), 1_000_000):
        spans.add(flat[begin : begin + 1_000_000])
    assert spans.offset_bytes == 4
    span = spans.largest if is_told else None
    pieces = (piece.clone() for piece in flat.split(1_000_000))
    index, extra = _counted(
        lambda: TileIndex.from_pieces(pieces, flat.numel(), int(flat[-1]) + 1, "cpu", span=span)
    )
    assert index.offset.dtype == torch.int32 and torch.equal(index.positions(), flat)
    assert extra <= CHUNK_BYTES + (0 if is_told else 2 * flat.numel())


def test_a_wrong_span_is_refused():
    for span in (3, 5, 1 << 20):
        with pytest.raises(ValueError, match="span is not of these positions"):
            TileIndex.from_pieces([torch.tensor([1, 5])], 2, 9, "cpu", span=span)


@pytest.mark.parametrize("which", ["huge", "many"])
def test_counting_a_mask_takes_a_chunk(request, which):
    mask = request.getfixturevalue(which)
    counts, extra = _counted(lambda: mask_counts(mask, 4))
    assert counts.spread.active == mask.num_active and extra <= CHUNK_BYTES


@pytest.mark.parametrize(("rank", "size", "has_whole"), [(0, 1, True), (1, 2, True), (1, 2, False)])
@pytest.mark.parametrize("which", ["huge", "many"])
def test_compact_state_takes_a_chunk_beside_itself(request, monkeypatch, which, rank, size, has_whole):
    """Until its indices are there, and until all of it is. Index, masters and base values are bit for bit those of all
    positions at once."""
    mask = request.getfixturevalue(which)
    numels = [mask.numel(name) for name in mask.names]
    local_numel = sum(-(-numel // size) for numel in numels)
    weights = torch.randint(-(1 << 15), 1 << 15, (local_numel,), dtype=torch.int16).view(torch.bfloat16)
    device = torch.device("cpu") if has_whole else None
    before_masters = []
    with Peak() as peak:

        def noting(index):
            before_masters.append(peak.most - peak.nbytes())
            return padded_zeros(index)

        monkeypatch.setattr("lota.zero.compact.state.padded_zeros", noting)
        state = CompactState(mask.names, numels, weights, mask.chunks, rank, size, device)
        assert peak.most - peak.nbytes() <= CHUNK_BYTES
    assert before_masters[0] <= CHUNK_BYTES
    pieces, origin = [], 0
    for name, numel in zip(mask.names, numels, strict=True):
        positions, width = mask.indices(name), -(-numel // size)
        assert state.layout.slots[int(name)].counts == owner_counts(positions, numel, size)
        own = positions[(positions >= rank * width) & (positions < (rank + 1) * width)]
        pieces.append(own - rank * width + origin)
        origin += width
    expected = TileIndex.from_flat(torch.cat(pieces), local_numel)
    assert torch.equal(state.local_index.base, expected.base)
    assert torch.equal(state.local_index.offset, expected.offset)
    bits = weights[torch.cat(pieces)]
    assert torch.equal(state.base_values.view(torch.int16), bits.view(torch.int16))
    assert torch.equal(state.master.view(torch.int32), _masters(weights, expected).view(torch.int32))
    if has_whole:
        whole = torch.cat(list(_pieces(mask)))
        assert torch.equal(state.full_index.base, whole[::TILE])
        assert all(torch.equal(a, b) for a, b in zip(state.full_index.chunks(), whole.split(CHUNK), strict=True))


def _masters(weights: torch.Tensor, index: TileIndex) -> torch.Tensor:
    masters = padded_zeros(index)
    gather(weights, index, out=masters[: index.num_active])
    return masters

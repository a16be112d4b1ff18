"""Stochastic rounding is a hash of seed, step and place: unbiased, the same bits in every backend and every partition.

Expected bits come from Python's integers.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lota.kernels import TILE, Pull, TileIndex, adamw_, padded_zeros, rmsprop_, rounding_key

WORD = (1 << 64) - 1
UPDATES = ["adamw", "rmsprop"]


def _fmix64(x: int) -> int:
    x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD & WORD
    x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53 & WORD
    return x ^ x >> 33


def _random(seed: int, step: int, place: int) -> int:
    key = _fmix64((_fmix64(step) + seed) & WORD)
    return _fmix64((place * 0x9E3779B97F4A7C15 + key) & WORD) >> 48


def _rounded(values: torch.Tensor, seed: int, step: int, places: list[int]) -> torch.Tensor:
    """bf16 of fp32 values without a NaN."""
    words = [
        ((bits & 0xFFFFFFFF) + _random(seed, step, place)) >> 16
        for bits, place in zip(values.view(torch.int32).tolist(), places, strict=True)
    ]
    return torch.from_numpy(np.array(words, dtype=np.uint16).view(np.int16)).view(torch.bfloat16)


def _key(device: torch.device, seed: int = 3, step: int = 1) -> torch.Tensor:
    return rounding_key(seed, torch.tensor(float(step), dtype=torch.float64, device=device))


def _update(kind, weights, index, master, gradient, rounding, origin=0, lr=1e-2, skip=0.0, pull=None):
    """One step from new moments with a compact gradient; returns the master."""
    state = [padded_zeros(index) for _ in range(3)]
    state[0][: index.num_active], options = master, {"rounding": rounding, "origin": origin, "pull": pull}
    padded = padded_zeros(index)
    padded[: index.num_active] = gradient
    device = weights.device
    if kind == "adamw":
        scalars = torch.tensor([1.0, 1.0, lr, 0.5, skip], device=device)
        adamw_(weights, padded, index, *state, scalars, beta1=0.9, beta2=0.99, eps=1e-8, **options)
    else:
        scalars = torch.tensor([1.0, 0.0, lr, skip], device=device)
        rmsprop_(weights, padded, index, *state[:2], scalars, alpha=0.99, eps=1e-8, **options)
    return state[0][: index.num_active]


def _case(device, num_active, numel, seed=0):
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randperm(numel, generator=generator)[:num_active].sort().values
    weights = torch.randn(numel, generator=generator).bfloat16()
    master, gradient = torch.randn(2, num_active, generator=generator)
    index = TileIndex.from_flat(positions.to(device), numel)
    return positions, weights.to(device), index, master.to(device), gradient.to(device)


@pytest.mark.parametrize("kind", UPDATES)
@pytest.mark.parametrize("origin", [0, 2**33 + 5])
@pytest.mark.parametrize("num_active", [0, 1, TILE, TILE + 1])
def test_bits_are_those_of_the_hash(device, num_active, origin, kind):
    """Far apart and with 16- and 32-bit offsets; frozen entries keep their bits; a skipped step writes nothing."""
    for spread in (3, 400):
        positions, weights, index, master, gradient = _case(device, num_active, spread * num_active + 7)
        before = weights.clone()
        _update(kind, weights, index, master, gradient, _key(device), origin, skip=1.0)
        assert torch.equal(weights, before)
        new = _update(kind, weights, index, master, gradient, _key(device), origin)
        assert num_active == 0 or not torch.equal(new, master)
        expected = before.cpu()
        expected[positions] = _rounded(new.cpu(), 3, 1, [origin + p for p in positions.tolist()])
        assert torch.equal(weights.cpu(), expected)


@pytest.mark.parametrize("kind", UPDATES)
def test_pulled_masters_are_rounded_the_same_way(device, kind):
    positions, weights, index, master, gradient = _case(device, TILE + 1, 3 * TILE)
    plain = _update(kind, weights.clone(), index, master, gradient, None)
    expected = weights.cpu()
    old, importance = padded_zeros(index, torch.bfloat16), padded_zeros(index, torch.bfloat16).fill_(0.5)
    pull = Pull(old, importance, torch.tensor(2.0, device=device))
    new = _update(kind, weights, index, master, gradient, _key(device), pull=pull)
    assert torch.equal(new, plain / 2), "towards zero, half the way, which is exact"
    expected[positions] = _rounded(new.cpu(), 3, 1, positions.tolist())
    assert torch.equal(weights.cpu(), expected)


@pytest.mark.parametrize("kind", UPDATES)
def test_cut_into_partitions_equals_the_whole(device, kind):
    numel = 10_007
    positions, weights, index, master, gradient = _case(device, 3000, numel)
    whole = weights.clone()
    _update(kind, whole, index, master, gradient, _key(device))
    for size in (2, 3, 8, 16):
        width, pieces = -(-numel // size), []
        for start in range(0, numel, width):
            piece = weights[start : start + width].clone()
            entries = slice(*torch.searchsorted(positions, torch.tensor([start, start + piece.numel()])).tolist())
            local = index.slice(start, start + piece.numel())
            _update(kind, piece, local, master[entries], gradient[entries], _key(device), origin=start)
            pieces.append(piece)
        assert torch.equal(torch.cat(pieces), whole)


def test_the_mean_of_many_roundings_is_the_value(device):
    """Over places with one key, over keys at one place; five standard deviations of a fair coin, seeds fixed."""
    count = 20 * TILE
    index = TileIndex.from_flat(torch.arange(count, device=device), count)
    gradient = torch.zeros(count, device=device)
    for value in (1.0 + 2**-9, -(3.0 + 2**-10), 1e-39):
        exact = torch.full((count,), value)
        low = (exact[:1].view(torch.int32) & -65536).view(torch.float32).double()
        gap = ((exact[:1].view(torch.int32) & -65536) + 65536).view(torch.float32).double() - low
        weights = torch.zeros(count, dtype=torch.bfloat16, device=device)
        _update("adamw", weights, index, exact.to(device), gradient, _key(device), lr=0.0)
        steps = (weights.cpu().double() - low) / gap
        share = float((exact[0].double() - low) / gap)
        assert 0 < share < 1 and set(steps.tolist()) == {0.0, 1.0}, "nothing but the two neighbours"
        assert abs(float(steps.mean()) - share) < 5 * (share * (1 - share) / count) ** 0.5
    one = TileIndex.from_flat(torch.tensor([5], device=device), 9)
    ups = 0
    for step in range(200):
        weights = torch.zeros(9, dtype=torch.bfloat16, device=device)
        master = torch.tensor([1.0 + 2**-8], device=device)  # half way
        _update("adamw", weights, one, master, gradient[:1], _key(device, step=step), lr=0.0)
        ups += int(weights[5] > 1)
    assert abs(ups - 100) < 5 * 50**0.5


def test_what_needs_no_rounding_stays(device):
    """bf16 values, zeros and infinities of both signs keep their bits; a NaN stays one, even with all bits set."""
    values = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), 2.0**-133, -3.3895e38]).bfloat16()
    nans = torch.tensor([2**31 - 1, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    master = torch.cat([values.float(), nans]).repeat(200)
    index = TileIndex.from_flat(torch.arange(master.numel(), device=device), master.numel())
    weights = torch.zeros(master.numel(), dtype=torch.bfloat16, device=device)
    # The step subtracts 0, which keeps all of these but NaN payloads.
    _update("adamw", weights, index, master.to(device), torch.zeros_like(master, device=device), _key(device), lr=0.0)
    rows = weights.cpu().view(200, -1)
    assert torch.equal(rows[:, :8].view(torch.int16), values.view(torch.int16).expand(200, 8))
    assert rows[:, 8:].isnan().all()


def test_seeds_and_steps_have_their_own_bits(device):
    positions, weights, index, master, gradient = _case(device, TILE, 3 * TILE)
    rounded = []
    for seed, step in ((3, 1), (3, 2), (4, 1), (3, 1)):
        made = weights.clone()
        _update("adamw", made, index, master, gradient, _key(device, seed, step))
        rounded.append(made[positions.to(device)])
    assert torch.equal(rounded[0], rounded[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        # Two independent roundings of values uniform between neighbours differ in a third of the entries.
        assert 0.25 < float((rounded[one] != rounded[other]).float().mean()) < 0.42


@pytest.mark.parametrize("kind", UPDATES)
def test_refused(kind):
    _, weights, index, master, gradient = _case(torch.device("cpu"), 5, 20)
    key = _key(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"only bf16 weights can be rounded stochastically, got torch\.float32"):
        _update(kind, weights.float(), index, master, gradient, key)
    with pytest.raises(ValueError, match="origin=7 only counts for stochastic rounding"):
        _update(kind, weights, index, master, gradient, None, origin=7)
    for wrong in (key.double(), key.expand(2)):
        with pytest.raises(ValueError, match="rounding must be one int64 key on cpu"):
            _update(kind, weights, index, master, gradient, wrong)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="the seed of stochastic rounding must be in"):
            _key(torch.device("cpu"), seed)

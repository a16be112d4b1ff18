"""The step equals an independent numpy fp32 replay bit for bit, and touches nothing but active entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lota.kernels import (
    TILE,
    Pull,
    TileIndex,
    adamw_,
    adamw_scalars,
    gather,
    padded_zeros,
    pull_,
    pull_rate,
    rmsprop_,
    rmsprop_scalars,
)

BETA1, BETA2, EPS, LR, DECAY = 0.9, 0.95, 1e-8, 3e-3, 0.1
COUNTS = [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 17]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _setup(device: torch.device, num_active: int, dtype: torch.dtype, spread: int = 5):
    generator = torch.Generator().manual_seed(0)
    numel = spread * num_active + 7
    positions = torch.randperm(numel, generator=generator)[:num_active].sort().values
    weights = torch.randn(numel, generator=generator).to(dtype)
    index = TileIndex.from_flat(positions.to(device), numel)
    state = [padded_zeros(index) for _ in range(3)]
    state[0][:num_active] = weights[positions].float()
    return generator, positions, weights.to(device), index, state


def _scalars(device: torch.device, step: int, skip: bool = False, scale: float = 1.0, weight_decay: float = DECAY):
    return adamw_scalars(
        torch.tensor(scale, device=device),
        torch.tensor(skip, device=device),
        torch.tensor(float(step), dtype=torch.float64, device=device),
        lr=LR,
        weight_decay=weight_decay,
        beta1=BETA1,
        beta2=BETA2,
    )


def _pull(device: torch.device, num_entries: int, padded: int, dtype: torch.dtype, importance_dtype: torch.dtype):
    """A pull with rates from none to nearly all the way; what stands behind the entries is NaN."""
    generator = torch.Generator().manual_seed(1)
    old = torch.full((padded,), float("nan")).to(dtype)
    importance = torch.full((padded,), float("nan")).to(importance_dtype)
    old[:num_entries] = torch.randn(num_entries, generator=generator).to(dtype)
    importance[:num_entries] = torch.randn(num_entries, generator=generator).mul(4).exp().to(importance_dtype)
    importance[: num_entries // 5] = 0
    return Pull(old.to(device), importance.to(device), pull_rate(device, lr=3e-2, mu=10.0))


def _replayed(w: np.ndarray, pull: Pull) -> np.ndarray:
    old, importance = (tensor[: len(w)].cpu().float().numpy() for tensor in pull[:2])
    c = np.float32(pull.rate.cpu()) * importance
    return w - (w - old) * (c / (np.float32(1) + c))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
@pytest.mark.parametrize("compact", [True, False])
def test_adamw(device, num_active, dtype, compact, gradient_dtype):
    generator, positions, weights, index, (master, exp_avg, exp_avg_sq) = _setup(device, num_active, dtype)
    start = weights.clone()
    w, m, v = (t[:num_active].cpu().numpy().copy() for t in (master, exp_avg, exp_avg_sq))
    f = np.float32
    for step in range(1, 4):
        dense = torch.randn(weights.numel(), generator=generator).to(gradient_dtype)
        gradient = padded_zeros(index, gradient_dtype)
        gradient[:num_active] = dense[positions].to(device)
        gradient[num_active:] = float("nan")
        scale = f(0.37)
        adamw_(
            weights,
            gradient if compact else dense.to(device),
            index,
            master,
            exp_avg,
            exp_avg_sq,
            _scalars(device, step, scale=float(scale)),
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            compact=compact,
        )

        g = dense[positions].float().numpy() * scale
        m = m + (g - m) * f(1 - BETA1)
        v = v * f(BETA2) + g * g * f(1 - BETA2)
        denominator = np.sqrt(v) / f(np.sqrt(1 - BETA2**step)) + f(EPS)
        w = w * f(1 - LR * DECAY) - (m / denominator) * f(LR / (1 - BETA1**step))
        for ours, replayed in ((master, w), (exp_avg, m), (exp_avg_sq, v)):
            assert torch.equal(_bits(ours[:num_active].cpu()), _bits(torch.from_numpy(replayed)))
            assert not ours[num_active:].any(), "padding stays zero"
    _assert_weights(weights, start, positions, torch.from_numpy(w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
@pytest.mark.parametrize("compact", [True, False])
def test_rmsprop(device, num_active, dtype, compact):
    generator, positions, weights, index, (master, square_avg, _) = _setup(device, num_active, dtype)
    start = weights.clone()
    w, v = master[:num_active].cpu().numpy().copy(), square_avg[:num_active].cpu().numpy().copy()
    f = np.float32
    for _ in range(3):
        dense = torch.randn(weights.numel(), generator=generator)
        gradient = padded_zeros(index)
        gradient[:num_active] = dense[positions].to(device)
        scalars = rmsprop_scalars(
            torch.tensor(f(0.5), device=device), torch.tensor(False, device=device), lr=LR, weight_decay=DECAY
        )
        source = gradient if compact else dense.to(device)
        rmsprop_(weights, source, index, master, square_avg, scalars, alpha=0.99, eps=EPS, compact=compact)
        g = dense[positions].numpy() * f(0.5) + w * f(DECAY)
        v = v * f(0.99) + g * g * f(1 - 0.99)
        w = w - (g / (np.sqrt(v) + f(EPS))) * f(LR)
        assert torch.equal(_bits(master[:num_active].cpu()), _bits(torch.from_numpy(w)))
        assert torch.equal(_bits(square_avg[:num_active].cpu()), _bits(torch.from_numpy(v)))
    _assert_weights(weights, start, positions, torch.from_numpy(w), dtype)


@pytest.mark.parametrize("importance_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
@pytest.mark.parametrize("is_adamw", [True, False])
def test_pull(device, num_active, dtype, importance_dtype, is_adamw):
    """After the step's own arithmetic, with compact and dense gradients. What pads old values and importance is not
    seen; moments are those of a step without a pull."""
    for compact in (True, False):
        generator, positions, weights, index, (master, exp_avg, exp_avg_sq) = _setup(device, num_active, dtype)
        plain = [tensor.clone() for tensor in (weights, master, exp_avg, exp_avg_sq)]
        start, pull = weights.clone(), _pull(device, num_active, master.numel(), dtype, importance_dtype)
        for step in range(1, 3):
            dense = torch.randn(weights.numel(), generator=generator)
            gradient = padded_zeros(index)
            gradient[:num_active] = dense[positions].to(device)
            source = gradient if compact else dense.to(device)
            plain[1].copy_(master)
            if is_adamw:
                options = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "compact": compact}
                scalars = _scalars(device, step)
                adamw_(plain[0], source, index, *plain[1:], scalars, **options)
                adamw_(weights, source, index, master, exp_avg, exp_avg_sq, scalars, **options, pull=pull)
            else:
                options = {"alpha": 0.99, "eps": EPS, "compact": compact}
                scalars = torch.tensor([0.5, DECAY, LR, 0.0], device=device)
                rmsprop_(plain[0], source, index, plain[1], plain[3], scalars, **options)
                rmsprop_(weights, source, index, master, exp_avg_sq, scalars, **options, pull=pull)
            replayed = torch.from_numpy(_replayed(plain[1][:num_active].cpu().numpy(), pull))
            assert torch.equal(_bits(master[:num_active].cpu()), _bits(replayed))
            assert num_active < 2 or not torch.equal(master, plain[1])
            assert not master[num_active:].any(), "padding stays zero"
            assert torch.equal(exp_avg, plain[2]) and torch.equal(exp_avg_sq, plain[3])
        _assert_weights(weights, start, positions, replayed, dtype)


@pytest.mark.parametrize("importance_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", COUNTS)
def test_pull_alone(device, numel, dtype, importance_dtype):
    """Of masters of any length, and not where the step is skipped."""
    master, pull = torch.randn(numel).to(device), _pull(device, numel, numel, dtype, importance_dtype)
    before, expected = master.clone(), _replayed(master.cpu().numpy(), pull)
    for skip in (torch.tensor(True), torch.tensor(3.0), torch.tensor([float("nan")])):
        pull_(master, pull, skip.to(device))
        assert torch.equal(_bits(master), _bits(before))
    pull_(master, pull, torch.tensor(False, device=device))
    assert torch.equal(_bits(master.cpu()), _bits(torch.from_numpy(expected)))
    pull_(before, pull)
    assert torch.equal(_bits(master), _bits(before))


def test_pull_at_rate_0_leaves_the_bits(device):
    _, _, weights, index, (master, exp_avg, exp_avg_sq) = _setup(device, TILE + 5, torch.bfloat16)
    other = [tensor.clone() for tensor in (weights, master, exp_avg, exp_avg_sq)]
    pull = _pull(device, TILE + 5, master.numel(), torch.bfloat16, torch.float32)._replace(
        rate=pull_rate(device, lr=torch.zeros(1, device=device), mu=10.0)
    )
    gradient, options = padded_zeros(index), {"beta1": BETA1, "beta2": BETA2, "eps": EPS}
    gradient[: TILE + 5] = torch.randn(TILE + 5).to(device)
    adamw_(weights, gradient, index, master, exp_avg, exp_avg_sq, _scalars(device, 1), **options, pull=pull)
    adamw_(other[0], gradient, index, *other[1:], _scalars(device, 1), **options)
    for one, unpulled in zip((weights, master, exp_avg, exp_avg_sq), other, strict=True):
        assert torch.equal(_bits(one), _bits(unpulled))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_huge_rate_pulls_all_the_way(device, dtype):
    """To one unit in the last place of the old value, from up to as far away as that value is from 0."""
    old = torch.randn(2 * TILE + 3).to(dtype)
    master = old.float() * (1 + torch.rand(old.numel()))
    pulled = master.to(device, copy=True)
    importance = torch.ones(old.numel(), device=device)
    pull_(pulled, Pull(old.to(device), importance, pull_rate(device, lr=1e20, mu=1e10)))
    at = old.float().numpy()
    low, high = np.nextafter(at, np.float32(-np.inf)), np.nextafter(at, np.float32(np.inf))
    assert (low <= pulled.cpu().numpy()).all() and (pulled.cpu().numpy() <= high).all()
    assert not torch.equal(master, old.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_offsets_and_all_active(device, dtype):
    """32-bit offsets where entries are far apart, and a tensor whose every weight is active, with a ragged tail."""
    for num_active, spread in ((TILE + 3, 400), (5 * TILE + 1, 0)):
        numel = num_active * spread or num_active
        positions = torch.arange(num_active) * (spread or 1)
        index = TileIndex.from_flat(positions.to(device), numel)
        assert index.offset.dtype == (torch.int32 if spread else torch.int16)
        weights = torch.randn(numel).to(dtype).to(device)
        start, master = weights.clone(), padded_zeros(index)
        gather(weights, index, out=master[:num_active])
        gradient = torch.randn(numel)
        moments = padded_zeros(index), padded_zeros(index)
        scalars = _scalars(device, 1)
        adamw_(
            weights,
            gradient.to(device),
            index,
            master,
            *moments,
            scalars,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            compact=False,
        )
        assert torch.equal(_bits(moments[0][:num_active].cpu()), _bits(gradient[positions] * (1 - BETA1)))
        _assert_weights(weights, start, positions, master[:num_active].cpu(), dtype)


def test_cut_into_partitions_equals_the_whole(device):
    """2, 3, 8 and 16 partitions, one of them without an active entry."""
    numel = 10_007
    positions = torch.rand(numel, generator=torch.Generator().manual_seed(1)).lt(0.3).nonzero().flatten()
    positions = positions[(positions < 3000) | (positions > 5000)]
    weights, gradient = torch.randn(numel).bfloat16(), torch.randn(numel).bfloat16()

    def stepped(weights, gradient, positions):
        index = TileIndex.from_flat(positions.to(device), weights.numel())
        weights, state = weights.to(device, copy=True), [padded_zeros(index) for _ in range(3)]
        gather(weights, index, out=state[0][: index.num_active])
        options = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "compact": False}
        adamw_(weights, gradient.to(device), index, *state, _scalars(device, 1), **options)
        return [weights, *(tensor[: index.num_active] for tensor in state)]

    whole = stepped(weights, gradient, positions)
    for size in (2, 3, 8, 16):
        width = -(-numel // size)
        pieces = []
        for start in range(0, numel, width):
            inside = positions[(positions >= start) & (positions < start + width)] - start
            pieces.append(stepped(weights[start : start + width], gradient[start : start + width], inside))
        assert size < 8 or any(piece[1].numel() == 0 for piece in pieces)
        for number, tensor in enumerate(whole):
            assert torch.equal(torch.cat([piece[number] for piece in pieces]), tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_adamw", [True, False])
def test_skip_writes_nothing(device, dtype, is_adamw):
    _, _, weights, index, (master, exp_avg, exp_avg_sq) = _setup(device, TILE + 5, dtype)
    weights[:3] = float("nan")
    before = [t.clone() for t in (weights, master, exp_avg, exp_avg_sq)]
    gradient = padded_zeros(index).fill_(float("nan"))
    for pull in (None, _pull(device, TILE + 5, master.numel(), dtype, torch.float32)):
        if is_adamw:
            options = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "pull": pull}
            adamw_(weights, gradient, index, master, exp_avg, exp_avg_sq, _scalars(device, 0, skip=True), **options)
        else:
            scalars = torch.tensor([1.0, DECAY, LR, 1.0], device=device)
            rmsprop_(weights, gradient, index, master, exp_avg_sq, scalars, alpha=0.99, eps=EPS, pull=pull)
    for tensor, old in zip((weights, master, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(_bits(tensor), _bits(old))


@pytest.mark.parametrize("compact", [True, False])
def test_what_is_not_finite_stays_in_its_entry(device, compact):
    """And a frozen entry's gradient is never read. The same for a pull's old values and importance."""
    _, positions, weights, index, (master, exp_avg, exp_avg_sq) = _setup(device, TILE + 5, torch.bfloat16)
    frozen = torch.ones(weights.numel(), dtype=torch.bool)
    frozen[positions] = False
    dense = torch.zeros(weights.numel())
    dense[frozen], dense[positions[7]], dense[positions[9]] = float("nan"), float("nan"), float("inf")
    gradient = padded_zeros(index)
    gradient[: index.num_active] = dense[positions].to(device)
    scalars = _scalars(device, 1, weight_decay=0.0)
    source = gradient if compact else dense.to(device)
    options = {"beta1": BETA1, "beta2": BETA2, "eps": EPS, "compact": compact}
    adamw_(weights, source, index, master, exp_avg, exp_avg_sq, scalars, **options)
    assert torch.isnan(weights).nonzero().flatten().tolist() == [int(positions[7]), int(positions[9])]
    assert int(torch.isnan(master).sum()) == 2
    pull = _pull(device, index.num_active, master.numel(), torch.bfloat16, torch.bfloat16)
    pull.old[11], pull.importance[12] = float("nan"), float("nan")
    adamw_(weights, source, index, master, exp_avg, exp_avg_sq, scalars, **options, pull=pull)
    expected = [int(positions[entry]) for entry in (7, 9, 11, 12)]
    assert torch.isnan(weights).nonzero().flatten().tolist() == expected
    assert torch.isnan(master).nonzero().flatten().tolist() == [7, 9, 11, 12]


def _assert_weights(weights, start, positions, master, dtype):
    expected = start.clone()
    expected[positions.to(start.device)] = master.to(dtype).to(start.device)
    assert torch.equal(_bits(weights), _bits(expected))

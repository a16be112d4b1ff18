"""The step equals an independent numpy fp32 replay bit for bit, and touches nothing but active entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lota.kernels import TILE, TileIndex, adamw_, adamw_scalars, padded_zeros, rmsprop_, rmsprop_scalars

BETA1, BETA2, EPS, LR, DECAY = 0.9, 0.95, 1e-8, 3e-3, 0.1
COUNTS = [0, 1, TILE - 1, TILE, TILE + 1, 3 * TILE + 17]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _setup(num_active: int, dtype: torch.dtype, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    numel = 5 * num_active + 7
    positions = torch.randperm(numel, generator=generator)[:num_active].sort().values
    weights = torch.randn(numel, generator=generator).to(dtype)
    index = TileIndex.from_flat(positions, numel)
    state = [padded_zeros(index) for _ in range(3)]
    state[0][:num_active] = weights[positions].float()
    return generator, positions, weights, index, state


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
@pytest.mark.parametrize("compact", [True, False])
def test_adamw(num_active, dtype, compact):
    generator, positions, weights, index, (master, exp_avg, exp_avg_sq) = _setup(num_active, dtype)
    start = weights.clone()
    w, m, v = (t[:num_active].numpy().copy() for t in (master, exp_avg, exp_avg_sq))
    f = np.float32
    for step in range(1, 6):
        dense = torch.randn(weights.numel(), generator=generator).to(dtype)
        gradient = padded_zeros(index, dtype)
        gradient[:num_active] = dense[positions]
        scale = f(0.37)
        scalars = adamw_scalars(
            torch.tensor(scale),
            torch.tensor(False),
            torch.tensor(float(step), dtype=torch.float64),
            lr=LR,
            weight_decay=DECAY,
            beta1=BETA1,
            beta2=BETA2,
        )
        adamw_(
            weights,
            gradient if compact else dense,
            index,
            master,
            exp_avg,
            exp_avg_sq,
            scalars,
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
            assert torch.equal(_bits(ours[:num_active]), _bits(torch.from_numpy(replayed)))
            assert not ours[num_active:].any(), "padding stays zero"
    _assert_weights(weights, start, positions, torch.from_numpy(w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_active", COUNTS)
def test_rmsprop(num_active, dtype):
    generator, positions, weights, index, (master, square_avg, _) = _setup(num_active, dtype)
    start = weights.clone()
    w, v = master[:num_active].numpy().copy(), square_avg[:num_active].numpy().copy()
    f = np.float32
    for _ in range(5):
        gradient = padded_zeros(index)
        gradient[:num_active] = torch.randn(num_active, generator=generator)
        scalars = rmsprop_scalars(torch.tensor(f(0.5)), torch.tensor(False), lr=LR, weight_decay=DECAY)
        rmsprop_(weights, gradient, index, master, square_avg, scalars, alpha=0.99, eps=EPS)
        g = gradient[:num_active].numpy() * f(0.5) + w * f(DECAY)
        v = v * f(0.99) + g * g * f(1 - 0.99)
        w = w - (g / (np.sqrt(v) + f(EPS))) * f(LR)
        assert torch.equal(_bits(master[:num_active]), _bits(torch.from_numpy(w)))
        assert torch.equal(_bits(square_avg[:num_active]), _bits(torch.from_numpy(v)))
    _assert_weights(weights, start, positions, torch.from_numpy(w), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_skip_writes_nothing(dtype):
    _, _, weights, index, (master, exp_avg, exp_avg_sq) = _setup(TILE + 5, dtype)
    weights[:3] = float("nan")
    before = [t.clone() for t in (weights, master, exp_avg, exp_avg_sq)]
    gradient = padded_zeros(index).fill_(float("nan"))
    scalars = adamw_scalars(
        torch.tensor(1.0),
        torch.tensor(True),
        torch.zeros((), dtype=torch.float64),
        lr=LR,
        weight_decay=DECAY,
        beta1=BETA1,
        beta2=BETA2,
    )
    adamw_(weights, gradient, index, master, exp_avg, exp_avg_sq, scalars, beta1=BETA1, beta2=BETA2, eps=EPS)
    for tensor, old in zip((weights, master, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(_bits(tensor), _bits(old))


def test_nan_gradient_stays_in_its_entry():
    _, positions, weights, index, (master, exp_avg, exp_avg_sq) = _setup(TILE + 5, torch.float32)
    gradient = padded_zeros(index)
    gradient[7] = float("nan")
    scalars = adamw_scalars(
        torch.tensor(1.0),
        torch.tensor(False),
        torch.ones((), dtype=torch.float64),
        lr=LR,
        weight_decay=0.0,
        beta1=BETA1,
        beta2=BETA2,
    )
    adamw_(weights, gradient, index, master, exp_avg, exp_avg_sq, scalars, beta1=BETA1, beta2=BETA2, eps=EPS)
    assert torch.isnan(weights).nonzero().flatten().tolist() == [int(positions[7])]
    assert int(torch.isnan(master).sum()) == 1


def _assert_weights(weights, start, positions, master, dtype):
    expected = start.clone()
    expected[positions] = master.to(dtype)
    assert torch.equal(_bits(weights), _bits(expected))

"""Adding the differences as torch adds a sparse tensor gives every value, in stored order; in any order but a few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lota.delivery.deltas import Deltas, deltas

SHAPE = (400, 500)
SIZE = 400 * 500
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def add(base: Tensor, parts: Deltas, order: Tensor | None = None) -> Tensor:
    """What PEFT does: `weight += sparse_coo_tensor(...)`."""
    order = torch.arange(parts.positions.numel()) if order is None else order
    positions, values = parts.positions[order], parts.values[order]
    indices = torch.stack([positions // SHAPE[1], positions % SHAPE[1]]).int()
    weight = base.view(SHAPE).clone()
    weight += torch.sparse_coo_tensor(indices, values, SHAPE, check_invariants=True)
    return weight.flatten()


def uniform(scale: float, dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit of the mantissa in use."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * (torch.rand(SIZE, generator=generator, dtype=torch.float64) - 0.5)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [100.0, 1.0, 1e-2, 1e-4, 1e-6])
def test_values_that_have_nothing_to_do_with_the_base(dtype: torch.dtype, scale: float) -> None:
    base, values = uniform(1.0, dtype, 0), uniform(scale, dtype, 1)
    parts = deltas(torch.arange(SIZE), base, values)
    assert torch.equal(add(base, parts), values)
    shuffled = add(base, parts, torch.randperm(parts.positions.numel(), generator=torch.Generator().manual_seed(2)))
    wrong = shuffled != values
    assert int(wrong.sum()) <= parts.num_ordered <= parts.num_twice <= parts.num_entries
    assert parts.positions.numel() == parts.num_entries + parts.num_twice
    # half a unit of the base, which lies below 0.5
    assert float((shuffled.double() - values.double()).abs().max()) <= 2**-25 + torch.finfo(dtype).eps * scale
    if dtype == torch.float32 and scale == 1e-4:
        assert parts.num_ordered > SIZE / 2 and wrong.any()  # this test can fail


@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_as_training_makes_them_need_one_difference(dtype: torch.dtype) -> None:
    base = (0.02 * torch.randn(SIZE, generator=torch.Generator().manual_seed(0))).to(dtype)
    values = (base.float() + uniform(2e-4, torch.float32, 1)).to(dtype)
    parts = deltas(torch.arange(SIZE), base, values)
    assert torch.equal(add(base, parts), values)
    assert parts.num_entries == int((values != base).sum()) and parts.num_ordered < 1e-3 * SIZE


def test_unchanged_entries_cost_nothing_and_the_infinite_is_refused() -> None:
    base = torch.tensor([1.0, -0.0, 2.0])
    parts = deltas(torch.tensor([5, 6, 7]), base, torch.tensor([1.0, 0.0, 3.0]))
    assert parts.positions.tolist() == [7] and parts.values.tolist() == [1.0]
    assert deltas(torch.empty(0, dtype=torch.int64), base[:0], base[:0]).num_entries == 0
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match="infinite or NaN"):
            deltas(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([bad]))

"""However the step is launched (entries of a program, warps), it writes the same bits."""

from __future__ import annotations

import pytest
import torch

from lota.kernels import TILE, Pull, TileIndex, gather, padded_zeros
from lota.kernels.backend import backend


@pytest.mark.triton
@pytest.mark.parametrize("count", [1, 256, 257, TILE, 2 * TILE + 513])
@pytest.mark.parametrize(("block", "num_warps"), [(256, 1), (512, 2), (1024, 8)])
@pytest.mark.parametrize("is_pulled", [False, True])
@pytest.mark.parametrize("device", ["triton"], indirect=True)
def test_step_of_any_launch_shape_writes_the_same_bits(device, is_pulled, count, block, num_warps):
    generator = torch.Generator().manual_seed(count)
    numel = 3 * count + 5
    positions = torch.randperm(numel, generator=generator)[:count].sort().values.to(device)
    weights = torch.randn(numel, generator=generator).bfloat16().to(device)
    index = TileIndex.from_flat(positions, numel)
    gradient = padded_zeros(index)
    gradient[:count] = torch.randn(count, generator=generator).to(device)
    scalars = torch.tensor([1.0, 0.99, 1e-2, 0.3, 0.0], device=device)
    old, importance = padded_zeros(index, torch.bfloat16), torch.rand(index.offset.numel(), generator=generator)
    pull = Pull(old, importance.to(device), torch.tensor(0.5, device=device)) if is_pulled else None

    def stepped(**shape: int) -> list[torch.Tensor]:
        stepped_weights, state = weights.clone(), [padded_zeros(index) for _ in range(3)]
        gather(weights, index, out=state[0][:count])
        backend(device).adamw_(
            stepped_weights, gradient, index, *state, scalars, 0.9, 0.95, 1e-8, True, None, 0, pull, **shape
        )
        return [stepped_weights, *state]

    usual = stepped()
    assert not torch.equal(usual[0], weights)
    for one, other in zip(usual, stepped(block=block, num_warps=num_warps), strict=True):
        assert torch.equal(one, other)

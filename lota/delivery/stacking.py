"""Several tickets on one base at once: what entries get that more than one of them has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """Entries of one piece of memory. positions: int32 or int64 `[n]`, each once; values, base: `[n]` in the weights'
    dtype, all on one device."""

    positions: Tensor
    values: Tensor
    base: Tensor


def shared_positions(parts: Sequence[Entries]) -> Tensor:
    """The positions that at least two of the parts have: int64, ascending."""
    if len(parts) < 2:
        return torch.empty(0, dtype=torch.int64)
    places, counts = torch.cat([part.positions.long() for part in parts]).unique(return_counts=True)
    return places[counts > 1]


def sum_shared(parts: Sequence[Entries]) -> Entries:
    """The entries that at least two of the parts have: base + the sum of their differences, in fp32, rounded once."""
    shared = shared_positions(parts)
    base = torch.empty(shared.numel(), dtype=parts[0].base.dtype, device=shared.device)
    total = torch.zeros(shared.numel(), dtype=torch.float32, device=shared.device)
    for part in parts if shared.numel() else ():
        at = torch.searchsorted(shared, part.positions.long()).clamp_(max=shared.numel() - 1)
        is_shared = shared[at] == part.positions
        base[at[is_shared]] = part.base[is_shared]
        total.index_add_(0, at[is_shared], part.values[is_shared].float() - part.base[is_shared].float())
    return Entries(shared, (base.float() + total).to(base.dtype), base)

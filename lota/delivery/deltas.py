"""fp32 differences that make a ticket's values out of a base's, exactly, in the way torch adds a sparse tensor.

`dense += sparse` with an fp32 sparse tensor sums in fp32, whatever the dense dtype, and rounds once at the end; entries
that a sparse tensor holds twice are added one after the other. One difference d = value - base is enough where
fl(base + d) rounds to the value. Where the value lies so much closer to zero than the base that no fp32 number is that
difference, two are needed. First choice are the difference and its rounding error, which often give the value in
either order. Last choice is -base, then the value itself: exact in this order, which CPUs keep. GPUs add in any order,
and can miss such a value by half an fp32 unit of the base. No pair is exact in both orders there: the one added first
would have to be a multiple of the base's unit, and then the sum is one too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -0.0  # adding it changes no number, not even the sign of a zero


@dataclass(frozen=True)
class Deltas:
    """What to add where, in order. positions: int64 `[k]`, up to two of the same; values: fp32 `[k]`.

    num_entries: how many entries change; num_twice: how many of them are added to twice; num_ordered: how many of those
    are exact in this order only.
    """

    positions: Tensor
    values: Tensor
    num_entries: int
    num_twice: int
    num_ordered: int


def deltas(positions: Tensor, base_values: Tensor, values: Tensor) -> Deltas:
    """The differences for the entries whose value is not the base's already.

    positions: int64 `[n]`; base_values, values: `[n]` in the weights' dtype. Numbers are compared, so -0.0 is 0.0.
    ValueError where a value that is not finite meets a base value that is another one.
    """
    changed = base_values != values
    positions, base_values, values = positions[changed], base_values[changed], values[changed]
    if not bool(torch.isfinite(base_values).all() and torch.isfinite(values).all()):
        raise ValueError("a value or base value is infinite or NaN, which no difference gives exactly")
    dtype = values.dtype
    base, wanted = base_values.float(), values.float()
    first = wanted - base
    second = torch.full_like(first, PADDING)

    def missing(first: Tensor, second: Tensor, either_order: bool) -> Tensor:
        """Which of the entries would not get their value."""
        wrong = ((base + first) + second).to(dtype) != values
        return wrong | (((base + second) + first).to(dtype) != values) if either_order else wrong

    is_twice = missing(first, second, either_order=False)
    rest = ((wanted.double() - base.double()) - first.double()).float()
    second = torch.where(is_twice, rest, second)
    is_ordered = missing(first, second, either_order=True)
    first = torch.where(is_ordered, -base, first)
    second = torch.where(is_ordered, wanted, second)
    assert not bool(missing(first, second, either_order=False).any())
    return Deltas(
        torch.cat([positions, positions[is_twice]]),
        torch.cat([first, second[is_twice]]),
        positions.numel(),
        int(is_twice.sum()),
        int(is_ordered.sum()),
    )

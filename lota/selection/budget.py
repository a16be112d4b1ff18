"""How many entries are chosen: densities become integers here, and integers decide from then on."""

from __future__ import annotations

import math
from collections.abc import Mapping


def count_global(density: float, eligible: int, num_free: int) -> int:
    """round(density * eligible), if that is at least one and at most `num_free` (the entries not protected)."""
    num_active = round(density * eligible)
    if num_active == 0:
        raise ValueError(f"density {density:g} of {eligible} eligible entries rounds to none. {_least(eligible)}")
    if num_active > num_free:
        raise ValueError(
            f"density {density:g} asks for {num_active} of {eligible} eligible entries, but protected tickets leave "
            f"only {num_free}. {_largest(num_free, eligible)}"
        )
    return num_active


def count_per_tensor(density: float, numels: Mapping[str, int], num_free: Mapping[str, int]) -> dict[str, int]:
    """round(density * numel) for every tensor; tensors may get none, the model may not, and each count must fit."""
    counts = {name: round(density * numel) for name, numel in numels.items()}
    if not any(counts.values()):
        largest = max(numels.values(), default=0)
        raise ValueError(
            f"density {density:g} rounds to no entry in any of {len(numels)} tensors (the largest has {largest}). "
            + _least(largest)
        )
    short = [name for name, count in counts.items() if count > num_free[name]]
    if short:
        worst = min(short, key=lambda name: num_free[name] / numels[name])
        raise ValueError(
            f"density {density:g} asks for {counts[worst]} of {numels[worst]} entries of {worst}, but protected "
            f"tickets leave only {num_free[worst]} of them ({len(short)} tensors are short). "
            f'{_largest(num_free[worst], numels[worst])} Or use budget="global".'
        )
    return counts


def _largest(num_free: int, eligible: int) -> str:
    if num_free == 0:
        return "Nothing is left to choose."
    exact = num_free / eligible
    scale = 10 ** (5 - math.floor(math.log10(exact)))  # six digits, rounded down so that what is printed does fit
    return f"The largest density that fits is {math.floor(exact * scale) / scale:g}."


def _least(eligible: int) -> str:
    return f"The smallest that chooses one entry is about {1 / eligible:.2g}." if eligible else "There are no entries."

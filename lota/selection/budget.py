"""How many entries are chosen: densities become integers here, and integers decide from then on."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Mapping

BUDGETS = ("global", "per_tensor")


def validate_density(density: object) -> float:
    """`density` as a float in (0, 1]; ValueError with the likely meaning otherwise (90 -> 0.9)."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise ValueError(f"density must be a number in (0, 1], got {density!r}.")
    density = float(density)
    if 0 < density <= 1:
        return density
    meant = f" Did you mean {density / 100:g}?" if 1 < density <= 100 else ""
    raise ValueError(f"density must be in (0, 1], got {density:g}.{meant}")


def validate_budget(budget: object) -> str:
    """`budget` if it is "global" or "per_tensor"; ValueError with the closest of them otherwise."""
    if budget in BUDGETS:
        return str(budget)
    close = difflib.get_close_matches(str(budget).lower().replace("-", "_"), BUDGETS, n=1, cutoff=0.5)
    meant = f' Did you mean "{close[0]}"?' if close else ""
    raise ValueError(f'budget must be "global" or "per_tensor", got {budget!r}.{meant}')


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

"""Which rows of which data set make an epoch, in integers and by seed: shares, choices, and rows set aside."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction


def epoch_counts(sizes: Sequence[int], weights: Sequence[float], total: int | None = None) -> list[int]:
    """How many rows of each set an epoch has: `total` of them, shared out by weight.

    Without a total, the most that can be had without taking a row twice. A share that is no whole number goes by
    largest remainder. ValueError where a set would get no row.
    """
    whole = sum(Fraction(str(weight)) for weight in weights)
    shares = [Fraction(str(weight)) / whole for weight in weights]
    if total is None:
        total = int(min(size / share for size, share in zip(sizes, shares)))
    counts = apportion(total, shares)
    for number, count in enumerate(counts, start=1):
        if count == 0:
            raise ValueError(
                f"mixture, entry {number} would get none of {total} rows at a weight of {weights[number - 1]:g} of "
                f"{float(whole):g}: raise its weight, or set mixture_rows"
            )
    return counts


def apportion(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` split by shares that add up to 1, by largest remainder; equal remainders go to the first."""
    exact = [total * share for share in shares]
    counts = [int(part) for part in exact]
    order = sorted(range(len(shares)), key=lambda k: (counts[k] - exact[k], k))
    for k in order[: total - sum(counts)]:
        counts[k] += 1
    return counts


def choose(size: int, count: int, seed: str) -> list[int]:
    """`count` row numbers below `size`: every row equally often, and what is left over drawn without repeating one."""
    repeats, rest = divmod(count, size)
    return [*range(size)] * repeats + sorted(random.Random(seed).sample(range(size), rest))


def set_aside(size: int, count: int, seed: str) -> tuple[list[int], list[int]]:
    """`size` row numbers in two: those that stay, and `count` drawn ones, both ascending."""
    drawn = set(random.Random(seed).sample(range(size), count))
    return [row for row in range(size) if row not in drawn], sorted(drawn)


def shuffled(size: int, seed: str) -> list[int]:
    """The row numbers below `size` in an order of their own."""
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order

"""Frontiers: what a method forgets at matched quality of the new task, and intervals over seeds.

A point is a trained model, or one between it and its start: the new task's loss, and the old task's rise. A method's
curve joins the points of all its settings that no other of its points beats in both; which those are is decided on dev
rows, where they lie on test rows. Between neighbours it is linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# 97.5% points of Student's t by degrees of freedom, for 95% intervals of a mean.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Point:
    """new, rise: on test rows. new_dev, rise_dev: the same on dev rows. setting: what it comes from. beside: what else
    is known of it."""

    new: float
    rise: float
    new_dev: float
    rise_dev: float
    setting: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Interval:
    """Mean over seeds, half of its 95% t-interval (none for one seed), and the number of seeds."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float]) -> Interval | None:
    """Of a mean; None of nothing."""
    count = len(values)
    if not count:
        return None
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = _T[count - 2] if count - 2 < len(_T) else 1.96
    return Interval(mean, quantile * spread / math.sqrt(count), count)


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other beats on dev rows in both, by the new task's dev loss, best first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.new_dev, p.rise_dev)):
        if not kept or point.rise_dev < kept[-1].rise_dev:
            kept.append(point)
    return kept


def rise_at(points: Iterable[Point], level: float, beside: str | None = None) -> float | None:
    """What a method forgets where its new task's test loss is `level`, or another figure there; None where its curve
    does not reach so far."""
    curve = sorted(front(points), key=lambda p: p.new)
    for left, right in pairwise(curve):
        if left.new <= level <= right.new:
            share = (level - left.new) / (right.new - left.new) if right.new > left.new else 0.0
            ends = [point.rise if beside is None else point.beside.get(beside, 0.0) for point in (left, right)]
            return ends[0] + share * (ends[1] - ends[0])
    return None


def levels(start: float, points: Iterable[Point], shares: Sequence[float]) -> list[float]:
    """Test losses of the new task at which a share of what these points gain over the start is reached; the best point
    is the one with the lowest dev loss."""
    best = min(points, key=lambda point: point.new_dev).new
    return [start - share * (start - best) for share in shares]


def best_settings(points: Sequence[Point], wanted: Sequence[float], most: int) -> list[str]:
    """The settings that a method's curve runs through, on dev rows, at the wanted losses of the new task: at most
    `most`, those that are needed most often first; where it reaches none, the one with the lowest loss."""
    votes: dict[str, float] = {}
    curve = front(points)
    for level in wanted:
        for left, right in pairwise(curve):
            if left.new_dev <= level <= right.new_dev:
                nearer = right if right.setting and level - left.new_dev > right.new_dev - level else left
                for point in (left, right):
                    if point.setting:
                        votes[point.setting] = votes.get(point.setting, 0.0) + (1.0 if point is nearer else 0.5)
    if not votes:
        return [min(points, key=lambda p: p.new_dev).setting]
    return sorted(votes, key=lambda setting: -votes[setting])[:most]


def ratios(
    of: Mapping[int, Sequence[Point]], reference: Mapping[int, Sequence[Point]], at: Mapping[int, Sequence[float]]
) -> list[Interval | None]:
    """Per level, over the seeds that reach it: what a method forgets over what the reference does."""
    count = len(next(iter(at.values()), ()))
    made = []
    for number in range(count):
        values = []
        for seed in of.keys() & reference.keys():
            own, other = rise_at(of[seed], at[seed][number]), rise_at(reference[seed], at[seed][number])
            if own is not None and other is not None and other > 0:
                values.append(own / other)
        made.append(interval(values))
    return made

"""Forgetting at matched quality: fronts decided on dev rows, read on test rows, linear between; intervals."""

from __future__ import annotations

import math

import pytest

from lota.study.frontier import Point, best_settings, front, interval, levels, rise_at


def point(new: float, rise: float, setting: str = "", dev: tuple[float, float] | None = None) -> Point:
    return Point(new, rise, *(dev or (new, rise)), setting)


def test_the_front_leaves_out_what_another_point_beats_on_dev_rows() -> None:
    points = [point(1.0, 0.5), point(1.2, 0.6), point(1.4, 0.1), point(0.9, 0.2, dev=(1.3, 0.4))]
    assert [(p.new, p.rise) for p in front(points)] == [(1.0, 0.5), (0.9, 0.2), (1.4, 0.1)]


def test_between_two_points_it_is_linear_and_beyond_them_nothing_is_known() -> None:
    points = [point(1.0, 0.8), point(2.0, 0.0)]
    assert rise_at(points, 1.25) == pytest.approx(0.6)
    assert rise_at(points, 1.0) == 0.8
    assert rise_at(points, 0.99) is None
    assert rise_at(points, 2.01) is None
    assert rise_at([], 1.0) is None


def test_levels_are_shares_of_the_gain() -> None:
    points = [point(1.5, 0), point(1.0, 0), point(0.9, 0, dev=(1.1, 0))]  # the last one is best on test rows only
    assert levels(3.0, points, (0.5, 0.9, 1.0)) == pytest.approx([2.0, 1.2, 1.0])


def test_an_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found is not None and found.half is not None
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # of a standard deviation of 1
    alone = interval([1.5])
    assert alone is not None and alone.half is None
    assert interval([]) is None


def test_the_settings_to_repeat_are_those_the_curve_runs_through() -> None:
    points = [point(1.0, 0.9, "fast"), point(1.4, 0.5, "slow"), point(1.8, 0.45, "pulled"), point(2.5, 0.0)]
    assert best_settings(points, [1.1], 1) == ["fast"]
    assert set(best_settings(points, [1.1, 1.35], 2)) == {"fast", "slow"}
    assert best_settings(points, [0.5], 2) == ["fast"]  # none reaches it: the one that comes closest

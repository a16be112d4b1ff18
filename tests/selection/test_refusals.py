"""What cannot be selected from is refused by name, with what was expected, what came and the cure."""

from __future__ import annotations

import struct

import pytest
import torch

from lota.choices import check_budget, check_density
from lota.selection import select
from tests.selection.oracle import pieces_of


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (90, r"density must be in \(0, 1\], got 90\. Did you mean 0\.9\?"),
        (1.5, r"got 1\.5\. Did you mean 0\.015\?"),
        (0, r"density must be in \(0, 1\], got 0\.$"),
        (-0.1, r"got -0\.1\.$"),
        (1000, r"got 1000\.$"),
        (float("nan"), r"got nan\.$"),
        (float("inf"), r"got inf\.$"),
        ("0.1", r"density must be a number in \(0, 1\], got '0\.1'"),
        (True, r"density must be a number in \(0, 1\], got True"),
        (None, r"density must be a number in \(0, 1\], got None"),
    ],
)
def test_density(density, message):
    with pytest.raises(ValueError, match=message):
        check_density(density)
    with pytest.raises(ValueError, match=message):
        select(lambda: pytest.fail("validation comes first"), {"w": (4,)}, density=density)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("per-tensor", 'budget must be "global" or "per_tensor", got \'per-tensor\'. Did you mean "per_tensor"?'),
        ("Global", 'Did you mean "global"?'),
        ("rows", "got 'rows'."),
        (None, "got None."),
    ],
)
def test_budget(budget, message):
    with pytest.raises(ValueError) as raised:
        check_budget(budget)
    assert message in str(raised.value)
    with pytest.raises(ValueError, match="budget must be"):
        select(lambda: pytest.fail("validation comes first"), {"w": (4,)}, density=0.5, budget=budget)


def test_densities_that_are_right_come_back_as_they_are():
    assert [check_density(density) for density in (1, 1.0, 0.1, 1e-9)] == [1.0, 1.0, 0.1, 1e-9]
    assert isinstance(check_density(1), float)
    assert [check_budget(budget) for budget in ("global", "per_tensor")] == ["global", "per_tensor"]


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({}, {}, "at least one eligible tensor"),
        ({"w": (10, 10)}, {"density": 0.004}, r"rounds to none\. The smallest that chooses one entry is about 0\.01"),
        (
            {"v": (0,), "w": (10, 10)},
            {"density": 0.004, "budget": "per_tensor"},
            r"rounds to no entry in any of 2 tensors \(the largest has 100\)",
        ),
        ({"w": (0,)}, {}, r"rounds to none\. There are no entries"),
        ({"w": (4,)}, {"seed": -1}, r"seed must be an integer in \[0, 2\*\*63\), got -1"),
        ({"w": (4,)}, {"seed": 0.5}, "got 0.5"),
        ({"w": (4,)}, {"base": {}}, r"base must identify every eligible tensor, got none for w"),
        ({"w": (4,)}, {"protect": "ticket"}, r"protect must be a sequence of Mask"),
    ],
)
def test_arguments(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        select(lambda: pytest.fail("validation comes first"), shapes, **({"density": 0.5} | options))


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFC00000, 0xFF800001, 0x7FFFFFFF])
def test_nan_names_the_tensor(bits, budget):
    nan = torch.frombuffer(bytearray(struct.pack("<I", bits)), dtype=torch.float32)
    scores = {"fine": torch.tensor([1.0, float("inf")]), "broken": torch.cat([torch.ones(8), nan])}
    pieces, shapes = pieces_of(scores)
    with pytest.raises(ValueError, match=r"got 1 NaN in broken\. Calibration diverged: lower"):
        select(pieces, shapes, density=0.5, budget=budget)


def test_nan_in_several_tensors():
    scores = {name: torch.tensor([float("nan"), float("nan"), 1]) for name in "abc"}
    pieces, shapes = pieces_of(scores)
    with pytest.raises(ValueError, match=r"got 2 NaN in a \(and some in 2 other tensors\)"):
        select(pieces, shapes, density=0.5)


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
def test_all_zero(budget):
    pieces, shapes = pieces_of({"a": torch.zeros(9), "b": -torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"got 0 for all that may be chosen\. Calibration moved nothing"):
        select(pieces, shapes, density=0.5, budget=budget)


def test_one_score_is_enough_to_not_be_all_zero():
    pieces, shapes = pieces_of({"a": torch.zeros(9), "b": torch.tensor([0.0, 1e-45, 0])})
    for budget in ("global", "per_tensor"):
        selection = select(pieces, shapes, density=0.5, budget=budget)
        assert selection.mask.indices("b").tolist()[0:2].count(1) == 1
        assert selection.num_zero_scored == selection.num_active - 1


ONES = torch.ones(4)


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("v", 0, ONES), ("w", 0, ONES), ("x", 0, ONES)], r"gave scores for x, expected one of the 2 in `shapes`"),
        (
            [("w", 0, ONES), ("v", 0, ONES)],
            r"(gave v at 0 after a later piece; expected the tensors|exactly once), in (the|that) order",
        ),
        ([("v", 2, ONES[:2]), ("v", 0, ONES[:2]), ("w", 0, ONES)], r"gave v at 0 after a later piece"),
        ([("v", 0, ONES[:3]), ("v", 2, ONES[:2]), ("w", 0, ONES)], r"without overlap"),
        ([("v", 0, ONES)], r"expected 4 scores for w over all ranks, got 0"),
        ([("v", 0, ONES), ("w", 0, ONES[:3])], r"expected 4 scores for w over all ranks, got 3"),
        ([("v", 1, ONES), ("w", 0, ONES)], r"scores of v must lie in \[0, 4\), got \[1, 5\)\. Cut off the padding"),
        ([("v", -1, ONES), ("w", 0, ONES)], r"got \[-1, 3\)"),
        (
            [("v", 0, ONES.view(2, 2)), ("w", 0, ONES)],
            r"must be a flat floating-point tensor, got torch.float32 \(2, 2\)",
        ),
        ([("v", 0, ONES.int()), ("w", 0, ONES)], r"must be a flat floating-point tensor, got torch.int32"),
    ],
)
def test_pieces(pieces, message, budget):
    with pytest.raises(ValueError, match=message):
        select(lambda: pieces, {"v": (4,), "w": (2, 2)}, density=0.5, budget=budget)


@pytest.mark.parametrize("changed", [torch.zeros(100), torch.full((100,), 9.0), torch.rand(100)])
def test_scores_that_change_between_calls(changed):
    calls = iter([torch.rand(100) + 1, changed, changed + 1, changed * 2])
    with pytest.raises(RuntimeError, match=r"pieces\(\)"):
        select(lambda: [("w", 0, next(calls))], {"w": (100,)}, density=0.5)


def test_a_piece_that_comes_in_parts_and_empty_is_whole():
    scores = torch.arange(10.0)
    parts = [("w", 0, scores[:0]), ("w", 0, scores[:4]), ("w", 4, scores[4:4]), ("w", 4, scores[4:])]
    assert select(lambda: parts, {"w": (10,)}, density=0.3).mask.indices("w").tolist() == [7, 8, 9]

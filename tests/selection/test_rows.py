"""A pattern may name a range of rows; one that is empty, leaves the tensor or contradicts another one is refused."""

from __future__ import annotations

import pytest

from lota.selection import candidates
from lota.selection.rows import split_rows
from lota.ticket.rows import row_size

SHAPES = {"embed.weight": (10, 4), "layers.0.up.weight": (6, 4), "layers.1.up.weight": (8, 4), "scale": ()}


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("embed.weight[7:]", {"embed.weight": (7, 10)}),
        ("embed.weight[:3]", {"embed.weight": (0, 3)}),
        ("embed.weight[-2:]", {"embed.weight": (8, 10)}),
        ("embed.weight[2:-2]", {"embed.weight": (2, 8)}),
        ("embed.weight[:]", {}),
        ("embed.weight", {}),
        ("layers.[0-1].up.weight", {}),
        ("layers.*.up.weight[5:]", {"layers.0.up.weight": (5, 6), "layers.1.up.weight": (5, 8)}),
    ],
)
def test_ranges(pattern: str, rows: dict[str, tuple[int, int]]) -> None:
    plain, found = split_rows([pattern], SHAPES, "include")
    assert found == rows
    assert plain == [pattern.split("[")[0] if rows or "[:]" in pattern else pattern]


@pytest.mark.parametrize("pattern", ["embed.weight[10:]", "embed.weight[3:3]", "embed.weight[:11]", "scale[:1]"])
def test_ranges_outside_of_the_tensor_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"expected a range of rows inside"):
        split_rows([pattern], SHAPES, "include")


def test_two_ranges_of_one_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different rows of embed.weight"):
        split_rows(["embed.weight[:3]", "embed.*"], SHAPES, "dense")


def test_a_pattern_that_matches_nothing_is_refused_by_its_option() -> None:
    with pytest.raises(ValueError, match=r'dense pattern "head.weight" matches none'):
        split_rows(["head.weight[3:]"], SHAPES, "dense")


def test_row_size() -> None:
    assert [row_size(shape) for shape in SHAPES.values()] == [4, 4, 4, 1]


def test_what_is_excluded_stays_out_though_rows_of_it_are_included() -> None:
    shapes = {"embed.weight": (8, 4), "layers.0.mlp.up_proj.weight": (4, 4), "head.weight": (8, 4)}
    chosen = candidates(shapes, ["default", "embed.weight[4:]", "head.weight[4:]"], ["head.*"])
    assert chosen.names == ("embed.weight", "layers.0.mlp.up_proj.weight")
    assert chosen.rows == {"embed.weight": (4, 8)}

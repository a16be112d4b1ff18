"""A tensor's layer and kind are read from its name, for every naming that models use."""

from __future__ import annotations

import pytest

from lota.ticket.density_grid import Place, density_grid, place


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("model.layers", 3, "self_attn.q_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Place("model.layers", 3, "self_attn.q_proj.bias")),
        ("transformer.h.11.attn.c_attn.weight", Place("transformer.h", 11, "attn.c_attn")),
        ("model.layers.0.mlp.experts.7.w1.weight", Place("model.layers", 0, "mlp.experts.*.w1")),
        ("model.layers.0.mlp.experts.gate_up_proj", Place("model.layers", 0, "mlp.experts.gate_up_proj")),
        ("decoder.block.1.layer.2.DenseReluDense.wi.weight", Place("decoder.block", 1, "layer.*.DenseReluDense.wi")),
        ("model.embed_tokens.weight", Place("", None, "model.embed_tokens")),
        ("score", Place("", None, "score")),
        ("7", Place("", None, "7")),
    ],
)
def test_place(name: str, expected: Place) -> None:
    assert place(name) == expected


def test_grid_counts_what_shares_a_cell_and_keeps_the_order() -> None:
    counts = {f"model.layers.{n}.mlp.experts.{e}.w1.weight": (n + e, 10) for n in (0, 2, 10) for e in (0, 1)}
    counts |= {"model.layers.2.attn.q.weight": (5, 10), "lm_head.weight": (1, 4), "empty.weight": (0, 0)}
    grid = density_grid(counts)
    assert grid.rows == ("0", "2", "10", "outside") and grid.columns == ("w1", "q", "lm_head", "empty")
    assert grid.cells == (
        (1 / 20, None, None, None),
        (5 / 20, 5 / 10, None, None),
        (21 / 20, None, None, None),
        (None, None, 1 / 4, None),
    )
    assert grid.row_density == (1 / 20, 10 / 30, 21 / 20, 1 / 4)
    assert grid.column_density == (27 / 60, 5 / 10, 1 / 4, 0.0)
    assert density_grid({}).rows == ()


def test_many_layers_share_rows_and_several_stacks_are_told_apart() -> None:
    grid = density_grid({f"h.{n}.up.weight": (n, 100) for n in range(80)}, max_rows=16)
    assert len(grid.rows) == 16 and grid.rows[0] == "0-4" and grid.rows[-1] == "75-79"
    assert grid.cells[0][0] == pytest.approx(0.02)
    two = density_grid({"encoder.block.0.q.weight": (1, 4), "decoder.block.0.q.weight": (2, 4)})
    assert two.rows == ("encoder.block.0", "decoder.block.0") and two.columns == ("q",)


def test_kinds_that_end_alike_keep_their_whole_name() -> None:
    names = ["l.0.self_attn.o.weight", "l.0.cross_attn.o.weight", "l.0.mlp.up.bias", "l.0.mlp.up.weight"]
    assert density_grid(dict.fromkeys(names, (1, 2))).columns == ("self_attn.o", "cross_attn.o", "up.bias", "up")

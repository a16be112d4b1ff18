"""The picture of a run needs its folder only, shows whatever is there with labels apart, and never costs the run."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lota.data.options import plan_data
from lota.run.folder import RunFolder
from lota.run.options import parse
from lota.run.report import draw_report, headline, picture, read_series, smoothed
from lota.run.resolve import resolve
from lota.ticket import Mask
from lota.ticket.density_grid import density_grid

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.experts.gate_up_proj", "post_attention_layernorm")
OUTSIDE = {"model.embed_tokens.weight": (3, 100), "lm_head.weight": (90, 100)}


def counts(num_layers: int) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{n}.{kind}.weight": (n % 7, 100) for n in range(num_layers) for kind in KINDS}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [{"phase": "calibrate", "step": 0, "eval_loss": 3.0}]
    rows += [{"phase": "calibrate", "step": n, "loss": 3 / n, "learning_rate": 0.1, "grad_norm": 1.0} for n in (1, 2)]
    rows += [{"phase": "train", "step": n, "loss": 2.0 + n, "grad_norm": float("nan")} for n in (1, 2, 3)]
    rows += [{"phase": "train", "step": 2, "loss": 1.0}, {"phase": "train", "step": 3, "train_runtime": 1.0}]  # resumed
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Mask.from_dense({"model.layers.0.up.weight": torch.eye(4).bool()}).save(tmp_path / "mask")
    return tmp_path


def test_curves_are_what_was_logged_last_and_finite(run: Path) -> None:
    series = read_series(run)
    assert series["calibrate"]["eval_loss"] == [(0, 3.0)] and series["calibrate"]["loss"] == [(1, 3.0), (2, 1.5)]
    assert series["train"] == {"loss": [(1, 3.0), (2, 1.0), (3, 5.0)]}


def test_it_is_drawn_alone_and_in_part(run: Path) -> None:
    subprocess.run([sys.executable, "-m", "lota", "report", str(run)], check=True, capture_output=True)
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    (run / "metrics.jsonl").unlink()
    draw_report(run, {})
    assert not [file for file in run.iterdir() if "partial" in file.name]
    (run / "empty").mkdir()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_report(run / "empty", {})


@pytest.mark.parametrize(
    "tensors",
    [
        counts(2), counts(80) | OUTSIDE, counts(126), OUTSIDE,
        {f"{stack}.block.{n}.layer.0.q.weight": (1, 10) for stack in ("encoder", "decoder") for n in range(24)},
    ],
)  # fmt: skip
def test_labels_do_not_overlap(tensors: dict[str, tuple[int, int]]) -> None:
    curves = {"train": {"loss": [(n, 1 / n) for n in range(1, 200)], "learning_rate": [(1, 1e-4), (2000, 0.0)]}}
    figure = picture(curves, density_grid(tensors, 100), "a title\nof two lines")
    FigureCanvasAgg(figure).draw()
    width, height = figure.get_size_inches() * figure.dpi
    for axes in figure.get_axes():
        for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
            boxes = [box for box in boxes if box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height]
            assert boxes or axes.get_title() in ("gradient norm", "")  # not logged; the color bar
            for one, other in itertools.pairwise(boxes):
                assert not one.overlaps(other), axes.get_title()


def test_the_headline_and_the_average() -> None:
    summary = {
        "method": "lota", "model": "owner/base",
        "mask": {"density": 0.1, "num_active": 1000, "eligible": 10_000},
        "training": {"steps": 1234, "eval_loss_before": 3.5, "eval_loss": 2.25},
    }  # fmt: skip
    assert headline(summary) == (
        "lota on base, density 0.1 (1,000 of 10,000 eligible weights)\n1,234 steps, eval loss 3.5 before, 2.25 after"
    )
    assert headline({}) == "lota on a run"
    assert smoothed([2.0] * 100) == pytest.approx([2.0] * 100)


def test_a_picture_that_fails_does_not_cost_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    words = ["--model_name_or_path", "base", "--output_dir", str(tmp_path / "run")]
    args, config = parse([*words, "--train_file", str(tmp_path / "rows.jsonl")])
    folder = RunFolder(resolve(args, config, argv=words), config, plan_data(args))
    (folder.path / "metrics.jsonl").write_text("not JSON\n", encoding="utf-8")
    folder.draw_report({})
    assert "report.png was not drawn (JSONDecodeError" in capsys.readouterr().out
    assert sorted(file.name for file in folder.path.iterdir()) == ["config.yaml", "metrics.jsonl", "run.json"]

"""A whole study of a few runs: one table, resumed where it was stopped, unchanged when done, one row recomputed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lota.study import rows as table
from lota.study.presets import SMOKE, Preset
from lota.study.study import Place, TimeIsOver, recompute, study


@pytest.fixture(scope="module")
def preset() -> Preset:
    return replace(
        SMOKE,
        base=replace(SMOKE.base, hidden_size=32, num_layers=1, num_heads=2, steps=20, save_every=100),
        data=replace(SMOKE.data, num_texts=600, num_train=32, num_dev=8, num_test=12, num_general=12),
        steps=3,
        calibration_steps=2,
        pulls=(10.0,),
        rates={name: rates[:1] for name, rates in SMOKE.rates.items()},
        questions=("q2",),
        methods=("full", "ticket 10%", "ticket 10%, pull"),
    )


@pytest.fixture(scope="module")
def out(preset: Preset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped at once, then done."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.raises(TimeIsOver):
        study(preset, Place(folder, None, 1, minutes=0.0))
    study(preset, Place(folder, None, 1))
    return folder


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_table(preset: Preset, out: Path) -> None:
    rows = table.read(out / "runs.csv")
    assert {row["method"] for row in rows if row["question"] == "q2"} == set(preset.methods)
    for row in rows:
        assert row["new_test"] > 0 and row["kl"] >= 0 and 0 < row["moved_share"] < 1
    ticket, pulled = (
        next(r for r in rows if r["row"].startswith(f"q2/peshan/{name}/0.01")) for name in preset.methods[1:]
    )
    assert ticket["num_trained"] == pulled["num_trained"] > 0
    assert pulled["fd2"] < ticket["fd2"]  # which the pull is for
    assert (out / "tables.md").read_text(encoding="utf-8").count("ticket 10%, pull") == 1
    assert (out / "figures" / "frontier.png").is_file()


def test_again_nothing_changes(preset: Preset, out: Path) -> None:
    before = everything(out)
    study(preset, Place(out, None, 1))
    assert everything(out) == before


def test_a_row_recomputed_agrees(preset: Preset, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recompute(preset, Place(out, None, 1), "q2/peshan/ticket 10%, pull/0.01 K10/s0@1")
    assert "agrees" in capsys.readouterr().out


def test_a_row_that_is_not_there(preset: Preset, out: Path) -> None:
    with pytest.raises(ValueError, match="has no row"):
        recompute(preset, Place(out, None, 1), "q2/peshan/ful/0.001/s0@1")

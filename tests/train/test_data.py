"""A recipe on two ranks learns from a table and conversations, mixed and packed; bad data ends every rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.data import tiny
from tests.rank_pool import RankPool
from tests.train.jobs import run_recipe, summary

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "i"}]


def options(tmp_path: Path, **changes: Any) -> list[str]:
    """A config file with a mixture of both, and the words that start a recipe with it."""
    base = tiny.save(tmp_path / "base", hidden_size=32, intermediate_size=64)
    table = "".join(f"{q},{a}\n" for q, a in zip("aceg" * 4, "bdfh" * 4, strict=True))
    (tmp_path / "table.csv").write_text("q,a\n" + table, encoding="utf-8")
    talks = "".join(json.dumps({"messages": TALK}) + "\n" for _ in range(40))
    (tmp_path / "talks.jsonl").write_text(talks, encoding="utf-8")
    content = {
        "model_name_or_path": str(base),
        "mixture": [
            {
                "train_file": str(tmp_path / "table.csv"),
                "prompt_field": "q",
                "completion_field": "a",
                "as_chat": True,
                "weight": 1,
            },
            {"train_file": [str(tmp_path / "talks.jsonl")], "weight": 2},
        ],
        "eval_rows": 7,
        "assistant_only_loss": True,
        "packing": True,
        "max_length": 24,
        "bf16": False,
        "calibration_steps": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 1,
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return ["--config", str(path)]


def test_a_packed_mixture(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    ranks(2).run(run_recipe, "train_lota", options(tmp_path))
    run = tmp_path / "run"
    shown = (run / "examples.txt").read_text(encoding="utf-8")
    # Answers alone are trained, in the table's rows as in the conversations; a row of 24 tokens holds several texts.
    assert "<user> a <end> <assistant> ⟦i⟧ ⟦<end>⟧" in shown
    assert any(f"<user> {q} <end> <assistant> ⟦{a}⟧ ⟦<end>⟧" in shown for q, a in ("ab", "cd", "ef", "gh"))
    assert shown.count("⟦<end>⟧ <user>") > 0 and "row 2: " in shown
    done = summary(run)
    assert done["training"]["steps"] == 2 and done["training"]["eval_loss"] < done["training"]["eval_loss_before"]
    # Packed for calibration and packed for training are the same rows: both phases begin with the base's loss.
    assert done["training"]["eval_loss_before"] == done["calibration"]["eval_loss_before"]
    again = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert [entry["weight"] for entry in again["mixture"]] == [1, 2] and again["eval_rows"] == 7


def test_bad_data_ends_every_rank_before_anything_is_written(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    wrong = [{"train_file": str(tmp_path / "table.csv"), "prompt_field": "question", "completion_field": "a"}]
    found = ranks(2).outcomes(run_recipe, "train_lota", options(tmp_path, mixture=wrong, assistant_only_loss=False))
    for outcome in found:
        assert outcome.error_type == "ValueError"
        assert "table.csv, row 1 has no field 'question'; it has 'q', 'a'" in outcome.error
    assert not list((tmp_path / "run").iterdir())  # the folder itself shows that all ranks see one


def test_rows_cut_to_nothing_end_every_rank(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    for packing in (True, False):
        words = options(tmp_path, max_length=4, packing=packing, output_dir=str(tmp_path / f"run{packing}"))
        for outcome in ranks(2).outcomes(run_recipe, "train_lota", words):
            assert outcome.error_type == "ValueError" and "no token of any row is trained" in outcome.error

"""Local rows become prompt and completion by field names or templates; what is missing is named with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.arguments import LotaArguments
from recipes.data import load

ROWS = [{"question": "1+1?", "answer": "2", "note": {"deep": 1}}, {"question": "a {b}", "answer": "c"}]


def write(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_fields_and_templates(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [*ROWS])
    rows, evaluation = load(LotaArguments(train_file=train, prompt_field="question", completion_field="answer"))
    assert rows.to_list() == [{"prompt": "1+1?", "completion": "2"}, {"prompt": "a {b}", "completion": "c"}]
    assert evaluation is None
    rows, evaluation = load(
        LotaArguments(
            train_file=train,
            eval_file=train,
            prompt_template="Q: {question}\n{{A}}:",
            completion_template=" {answer}",
        )
    )
    assert rows[1] == {"prompt": "Q: a {b}\n{A}:", "completion": " c"}
    assert evaluation is not None and evaluation.to_list() == rows.to_list()


def test_prompt_and_completion_are_the_default_fields(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}]
    assert load(LotaArguments(train_file=write(tmp_path / "t.jsonl", [*rows])))[0].to_list() == rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [*ROWS],
            {"prompt_field": "questoin", "completion_field": "answer"},
            "line 1 has no field 'questoin'.*Did you mean 'question'",
        ),
        (
            [ROWS[0], {"question": "x"}],
            {"prompt_field": "question", "completion_field": "answer"},
            "line 2 has no field",
        ),
        ([], {}, "holds no rows"),
        (["text"], {}, "line 1: expected a JSON object, got str"),
        ([*ROWS], {"prompt_field": "question", "prompt_template": "{question}"}, "not both"),
        ([*ROWS], {"prompt_template": "no name here"}, "names no field"),
        ([*ROWS], {"eval_split": "test"}, "eval_split belongs to dataset_name"),
        ([*ROWS], {"dataset_name": "x"}, "either train_file .* or dataset_name"),
    ],
)
def test_refusals(tmp_path: Path, rows: list[object], options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(LotaArguments(train_file=write(tmp_path / "train.jsonl", rows), **options))  # type: ignore[arg-type]


def test_files_that_are_not_there_or_not_jsonl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load(LotaArguments(train_file=str(tmp_path / "none.jsonl")))
    (tmp_path / "a.txt").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a \.jsonl, \.json, \.csv or \.parquet file"):
        load(LotaArguments(train_file=str(tmp_path / "a.txt")))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        load(LotaArguments(train_file=str(tmp_path / "bad.jsonl")))

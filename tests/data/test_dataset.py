"""Rows of every kind of file become the columns that TRL knows; what is wrong is named with its place and the cure."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from lota.data import sources
from lota.data.dataset import load
from lota.data.options import plan_data
from lota.run.options import LotaArguments, parse

ROWS = [{"question": "1+1?", "answer": "2", "note": {"deep": 1}}, {"question": "a {b}", "answer": "c"}]
FIELDS = {"prompt_field": "question", "completion_field": "answer"}
FILLED = [{"prompt": "1+1?", "completion": "2"}, {"prompt": "a {b}", "completion": "c"}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loaded(*files: str, **options: Any) -> list[dict[str, Any]]:
    return load(plan_data(LotaArguments(train_file=list(files), **options))).train.to_list()


def test_fields_and_templates(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", ROWS)
    assert loaded(train, **FIELDS) == FILLED
    templates = {"prompt_template": "Q: {question}\n{{A}}:", "completion_template": " {answer}"}
    rows, evaluation = load(plan_data(LotaArguments(train_file=[train], eval_file=[train], **templates)))
    assert rows[1] == {"prompt": "Q: a {b}\n{A}:", "completion": " c"}
    assert evaluation is not None and evaluation.to_list() == rows.to_list()


def test_prompt_and_completion_are_the_default_fields(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}]
    assert loaded(write(tmp_path / "t.jsonl", rows)) == rows


def test_every_kind_of_file_and_patterns(tmp_path: Path) -> None:
    plain = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text("\n " + json.dumps(ROWS, indent=1), encoding="utf-8")
    write(tmp_path / "c.json", ROWS)  # one object a line, by another name
    pd.DataFrame(plain).to_csv(tmp_path / "d.csv", index=False)
    pd.DataFrame(plain).to_parquet(tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.parquet"):
        assert loaded(str(tmp_path / name), **FIELDS) == FILLED, name
    assert loaded(str(tmp_path / "*.json*"), str(tmp_path / "d.csv"), **FIELDS) == 4 * FILLED


def test_text_stays_what_it_is(tmp_path: Path) -> None:
    """The readers of tables and of JSON that are in use elsewhere turn these into numbers, times and nothing."""
    texts = ["007", "2024-05-01", "NA", "1e5", " "]
    rows = [{"prompt": "p", "completion": text} for text in texts]
    pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    for file in (str(tmp_path / "a.csv"), write(tmp_path / "b.jsonl", rows)):
        assert [row["completion"] for row in loaded(file)] == texts
    assert loaded(write(tmp_path / "c.jsonl", [{"prompt": 1, "completion": 2.5}])) == [
        {"prompt": "1", "completion": "2.5"}
    ]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert loaded(write(path, [{"text": "old"}])) == [{"text": "old"}]
    assert loaded(write(path, [{"text": "new"}])) == [{"text": "new"}]


def test_conversations(tmp_path: Path) -> None:
    shared = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    assert loaded(write(tmp_path / "a.jsonl", [{"messages": TALK}])) == [{"messages": TALK}]
    assert loaded(write(tmp_path / "b.jsonl", [{"talk": shared}]), messages_field="talk") == [{"messages": TALK}]
    row = {"prompt": "a", "completion": "b"}
    assert loaded(write(tmp_path / "c.jsonl", [row]), as_chat=True) == [{"prompt": TALK[:1], "completion": TALK[1:]}]
    chat = {"prompt": TALK[:1], "completion": TALK[1:]}
    assert loaded(write(tmp_path / "d.jsonl", [chat])) == [chat]


def test_preferences(tmp_path: Path) -> None:
    def preferences(row: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        args = LotaArguments(train_file=[write(tmp_path / "p.jsonl", [row])], **options)
        return load(plan_data(args), task="preferences").train.to_list()

    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    assert preferences(row) == [row]
    named = {"question": "p", "good": "c", "bad": "r"}
    options = {"prompt_template": "Q {question}", "chosen_field": "good", "rejected_template": " {bad}"}
    assert preferences(named, **options) == [{"prompt": "Q p", "chosen": "c", "rejected": " r"}]
    assert preferences(row, as_chat=True)[0]["chosen"] == [{"role": "assistant", "content": "c"}]
    whole = {"prompt": "a", "chosen": TALK, "rejected": TALK}  # the prompt is in the answers already
    assert preferences(whole) == [{"chosen": TALK, "rejected": TALK}]
    with pytest.raises(
        ValueError, match=r"options for completion do not belong here: preference training takes prompt"
    ):
        preferences(row, completion_field="chosen")
    with pytest.raises(ValueError, match=r"options for chosen do not belong here.*train_dpo\.py"):
        loaded(write(tmp_path / "p.jsonl", [row]), chosen_field="chosen")


def test_hub_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(*names: Any, split: str) -> Dataset:
        asked.append((*names, split))
        return Dataset.from_list([{"prompt": split, "completion": "c"}])

    monkeypatch.setattr(sources, "load_dataset", hub)
    args = LotaArguments(dataset_name="some/set", dataset_config="main", eval_split="test")
    train, evaluation = load(plan_data(args))
    assert train["prompt"][0] == "train" and evaluation is not None and evaluation["prompt"][0] == "test"
    assert set(asked) == {("some/set", "main", "train"), ("some/set", "main", "test")}
    assert plan_data(args).describe() == "some/set/main (train)"

    def offline(*names: Any, split: str) -> Dataset:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sources, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"dataset_name 'some/set' cannot be loaded: no route to host"):
        load(plan_data(args))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (ROWS, FIELDS | {"prompt_field": "questoin"}, "line 1 has no field 'questoin'.*Did you mean 'question'"),
        (ROWS, {"prompt_template": "{questoin}", "completion_field": "answer"}, "no field 'questoin'.*'question'"),
        ([ROWS[0], {"question": "x"}], FIELDS, "line 2 has no field 'answer'"),
        ([ROWS[0], {"question": "x", "answer": None}], FIELDS, "line 2: the field 'answer' is empty"),
        (ROWS, {"text_field": "note"}, "line 1: expected text, got dict"),
        (ROWS, {}, "has the fields 'question', 'answer', 'note', and none of prompt and completion.*prompt_field"),
        ([{"prompt": "a", "completion": "b", "text": "c"}], {}, "could be read as prompt or text: say which"),
        ([], {}, "holds no rows"),
        (["text"], {}, "line 1: expected a JSON object, got str"),
        (ROWS, FIELDS | {"prompt_template": "{question}"}, "prompt_field or prompt_template, not both"),
        (ROWS, {"prompt_template": "no name here"}, "names no field"),
        (ROWS, {"prompt_template": "{question"}, "prompt_template .*for a brace"),
        (ROWS, {"prompt_field": "question", "messages_field": "x"}, "prompt, messages cannot stand together"),
        (ROWS, {"text_field": "question", "as_chat": True}, "as_chat is for prompt and completion"),
        ([{"messages": TALK}], {"eval_split": "test"}, "eval_split belongs to dataset_name"),
        (ROWS, {"dataset_name": "x"}, "either train_file .* or dataset_name"),
        (ROWS, {"dataset_config": "x"}, "dataset_config belongs to dataset_name"),
        ([{"messages": "hello"}], {}, "expected a list of messages .*A .csv holds text only"),
        ([{"messages": []}], {}, "expected a list of messages"),
        ([{"messages": [{"role": "asistant", "content": "x"}]}], {}, "role must be one of.*Did you mean 'assistant'"),
        ([{"messages": [{"role": "tool", "content": "x", "tool_calls": [1]}]}], {}, "Tool calls and images are not"),
        ([{"messages": [{"role": "user", "content": None}]}], {}, "must have role and content"),
        ([{"text": "a"}] * 3, {"eval_rows": 3}, "3 for evaluation leave none to train on"),
        ([{"text": "a"}], {"eval_fraction": 1.5}, r"eval_fraction must be in \(0, 1\), got 1.5"),
        ([{"text": "a"}], {"eval_rows": 0}, "eval_rows must be at least 1"),
        ([{"text": "a"}], {"eval_rows": 1, "eval_fraction": 0.5}, "not both"),
        ([{"text": "a"}], {"eval_rows": 1, "eval_file": "x.jsonl"}, "eval_rows takes the evaluation rows out of"),
        ([{"text": "a"}], {"mixture_rows": 5}, "mixture_rows is the size of an epoch of a mixture"),
    ],
)
def test_refusals(tmp_path: Path, rows: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(write(tmp_path / "train.jsonl", rows), **options)


@pytest.mark.parametrize(
    ("mixture", "options", "message"),
    [
        ([{"train_file": "A", "wieght": 1}], {}, r"entry 1: unknown option 'wieght'\. Did you mean 'weight'"),
        (
            [{"train_file": "A"}, {"trian_file": "A"}],
            {},
            r"entry 2: unknown option 'trian_file'\. Did you mean 'train_f",
        ),
        ([{"train_file": "A", "weight": 0}], {}, "weight must be above 0, got 0; to leave a data set out"),
        ([{"train_file": "A", "weight": -1}], {}, "weight must be above 0, got -1"),
        ([{"train_file": "A", "weight": float("nan")}], {}, "weight must be above 0, got nan"),
        ([{"train_file": "A", "weight": "2"}], {}, "weight must be above 0, got '2'"),
        ([{"train_file": "A", "weight": 1}, {"train_file": "A"}], {}, "entry 2 has no weight: give every entry one"),
        ([{"train_file": "A"}], {"mixture_rows": 4}, "mixture_rows needs a weight for every entry"),
        ([{"train_file": "A", "weight": 1}], {"mixture_rows": 0}, "mixture_rows must be at least 1"),
        ([{"weight": 1}], {}, "entry 1: give either train_file"),
        (["A"], {}, "entry 1 must hold options"),
        ([], {}, "mixture must be a list of data sets"),
        ([{"train_file": "A"}], {"train_file": "A"}, "move train_file into its entries"),
        ([{"train_file": "A"}], {"prompt_field": "q"}, "move prompt_field into its entries"),
        ([{"train_file": "A"}, {"train_file": "B"}], {}, "rows of one form, but .*A.jsonl holds prompt.*as_chat"),
        ([{"train_file": "C"}, {"train_file": "B"}], {}, "plain text goes together with plain prompt"),
    ],
)
def test_mixtures_that_are_refused(tmp_path: Path, mixture: list[Any], options: dict[str, Any], message: str) -> None:
    contents = {"A": {"prompt": "p", "completion": "c"}, "B": {"messages": TALK}, "C": {"text": "t"}}
    paths = {name: write(tmp_path / f"{name}.jsonl", [row]) for name, row in contents.items()}
    entries = [{k: paths.get(v, v) for k, v in e.items()} if isinstance(e, dict) else e for e in mixture]
    with pytest.raises(ValueError, match=message):
        load(plan_data(LotaArguments(mixture=entries, **options)))


def test_files_that_are_not_there_or_not_data(tmp_path: Path) -> None:
    for pattern in ("none.jsonl", "*.csv"):
        with pytest.raises(ValueError, match="no such file"):
            loaded(str(tmp_path / pattern))
    (tmp_path / "a.txt").write_text("a,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected a \.jsonl, \.json, \.csv or \.parquet file"):
        loaded(str(tmp_path / "a.txt"))
    for name, content, message in (
        ("bad.jsonl", '{"prompt": "x", "completion": "y"}\n{"prompt"\n', "line 2: not JSON"),
        ("bad.json", '[{"prompt": "x"', "not JSON"),
        ("empty.csv", "", "holds no rows"),
        ("head.csv", "prompt,completion\n", "holds no rows"),
        ("long.csv", "prompt,completion\nx,y,z\n", "more fields than the first line names"),
        ("uneven.csv", "prompt,completion\nx,y\nx,y,z\n", "cannot be read as csv.*line 3"),
        ("bad.parquet", "no", "cannot be read as parquet"),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            loaded(str(tmp_path / name))


def test_times_of_a_table_are_no_text(tmp_path: Path) -> None:
    pd.DataFrame({"text": [date(2024, 5, 1)]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match="row 1: expected text, got date"):
        loaded(str(tmp_path / "t.parquet"))


def test_a_mixture_in_the_config_file_and_on_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "t"}])
    (tmp_path / "run.yaml").write_text(f"mixture:\n- train_file: {file}\n  weight: 2\n", encoding="utf-8")
    args, _ = parse(["--config", str(tmp_path / "run.yaml")])
    assert load(plan_data(args)).train.to_list() == [{"text": "t"}]
    assert plan_data(args).describe() == [{"data": file, "weight": 2.0}]
    args, _ = parse(["--mixture", f"[{{train_file: {file}}}]"])
    assert load(plan_data(args)).train.to_list() == [{"text": "t"}]
    args, _ = parse(["--train_file", file, file])
    assert len(load(plan_data(args)).train) == 1  # a file that is named twice counts once

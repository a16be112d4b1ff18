"""Missing means missing, no column is dropped in silence, and whatever a row raises names file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lota.data.dataset import load
from lota.data.options import DataArguments, plan_data
from lota.data.templates import Template
from lota.run.options import LotaArguments, parse

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(path)


def loaded(*files: str, **options: Any) -> list[dict[str, Any]]:
    return load(plan_data(LotaArguments(train_file=list(files), **options))).train.to_list()


ODD = {
    "null": '{"prompt": "p", "completion": null}',
    "NaN": '{"prompt": "p", "completion": NaN}',
    "no text": '{"prompt": "p", "completion": ""}',
    "empty prompt": '{"prompt": "", "completion": "c"}',
}


@pytest.mark.parametrize("kind", [*ODD, "csv", "short csv", "parquet"])
def test_missing_is_one_thing_in_every_format(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"a.{kind.split()[-1] if 'csv' in kind or kind == 'parquet' else 'jsonl'}"
    if kind == "csv":
        path.write_text("prompt,completion\np,c\np,\n")
    elif kind == "short csv":
        path.write_text("prompt,completion\np,c\np\n")
    elif kind == "parquet":
        pd.DataFrame([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": None}]).to_parquet(path)
    else:
        write(path, ['{"prompt": "p", "completion": "c"}', ODD[kind]])
    with pytest.raises(ValueError, match=r"(line|row) 2: the field '\w+' is empty .*skip_empty: true"):
        loaded(str(path))
    capsys.readouterr()
    assert loaded(str(path), skip_empty=True) == [{"prompt": "p", "completion": "c"}]
    assert "1 rows of" in capsys.readouterr().out


def test_a_template_with_a_part_that_is_missing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "2+2", "more": "?", "a": "4"}, {"q": "3+3", "more": "", "a": "6"}, {"q": "", "more": None, "a": "6"}]
    options = {"prompt_template": "{q} {more}", "completion_field": "a"}
    with pytest.raises(ValueError, match=r"line 3: the fields 'q' and 'more' are empty"):
        loaded(write(tmp_path / "a.jsonl", rows), **options)
    made = loaded(write(tmp_path / "b.jsonl", rows[:2]), **options)
    assert [row["prompt"] for row in made] == ["2+2 ?", "3+3 "]
    assert "'more' is empty in 1 rows" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["Answer:", "input.text", "0", "a!r", "a:>3", "ü", "a b"])
def test_fields_are_plain_keys(tmp_path: Path, field: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"p": "x", field: "y"}])
    assert loaded(file, prompt_field="p", completion_field=field) == [{"prompt": "x", "completion": "y"}]
    made = loaded(file, prompt_field="p", completion_template="<{" + field + "}> {{}}")
    assert made == [{"prompt": "x", "completion": "<y> {}"}]


@pytest.mark.parametrize("text", ["{", "}", "{a", "a}", "{}", "no field", "{a}{", "{{a}"])
def test_templates_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"without its|names no field"):
        Template.parse(text)


def test_what_stands_beside_a_conversation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tools = [{"name": "search", "parameters": {}}]
    row = {"messages": TALK, "system": "be kind", "tools": tools, "id": 7}
    (made,) = loaded(write(tmp_path / "a.jsonl", [row]))
    assert made["messages"] == [{"role": "system", "content": "be kind"}, *TALK]
    assert json.loads(made["tools"]) == tools
    assert "are not read: id" in capsys.readouterr().out
    file = write(tmp_path / "b.jsonl", [{"messages": TALK, "tools": json.dumps(tools)}, {"messages": TALK}])
    assert [row["tools"] is None for row in loaded(file)] == [False, True]
    both = {"messages": [{"role": "system", "content": "s"}, *TALK], "system": "t"}
    with pytest.raises(ValueError, match=r"line 1: the field 'system' and the first message both"):
        loaded(write(tmp_path / "c.jsonl", [both]))
    for name, value in (
        ("images", ["x.png"]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("audio", "x.wav"),
    ):
        file = write(tmp_path / f"{name}.jsonl", [{"messages": TALK}, {"messages": TALK, name: value}])
        with pytest.raises(ValueError, match=f"line 2: '{name}' stands beside the conversation and would be dropped"):
            loaded(file)
        assert len(loaded(write(tmp_path / f"{name}-none.jsonl", [{"messages": TALK, name: None}]))) == 1
    file = write(tmp_path / "d.jsonl", [{"prompt": "a", "completion": "b", "system": "s"}])
    with pytest.raises(ValueError, match="'system' would be dropped: put it into prompt_template"):
        loaded(file, as_chat=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2: expected UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16"), "line 1: expected UTF-8, got UTF-16"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2.*half of a character"),
        (b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", "line 2: JSON nested too deeply"),
        (b'{"text": "a"}\n[1]\n', "line 2: expected a JSON object"),
        (b'{"text": "a"}\n{"text": {"b": 1}}\n', "line 2: expected text, got dict"),
        (b'{"text": "a"}\n{"text": ' + b"1" * 5000 + b"}\n", "line 2: not JSON"),
    ],
)
def test_what_a_row_raises_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.jsonl, {message}"):
        loaded(str(path))


def test_patterns_go_into_folders_and_a_file_counts_once(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    for number, folder in enumerate(("", "x/", "x/y/")):
        write(tmp_path / f"{folder}a.jsonl", [{"text": str(number)}])
    pattern = str(tmp_path / "**" / "*.jsonl")
    assert sorted(row["text"] for row in loaded(pattern)) == ["0", "1", "2"]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    assert len(loaded(pattern, str(tmp_path / "a.jsonl"), str(tmp_path / "x" / ".." / "a.jsonl"))) == 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"as_chat": "maybe"}, "as_chat must be true or false"),
        ({"prompt_field": 7}, "prompt_field must be text, got 7: put it in quotes"),
        ({"dataset_config": 7.5}, "dataset_config must be text"),
        ({"eval_file": [3]}, "eval_file must be a path or a list of paths"),
    ],
)
def test_entries_of_a_mixture_are_typed(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match=f"mixture, entry 1: {message}"):
        plan_data(DataArguments(mixture=[{"train_file": file, **entry}]))
    for word, is_chat in (("false", False), ("true", True), (False, False)):
        plan = plan_data(DataArguments(mixture=[{"train_file": file, "as_chat": word}]))
        assert plan.parts[0].source.as_chat is is_chat


def test_what_yaml_reads_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\neval_strategy: off\noutput_dir: x\nshard_group_size: 4\n")
    args, config = parse(["--config", str(path)])
    assert (config.save_strategy, config.eval_strategy, args.shard_group_size) == ("no", "no", "4")
    for line, name in (
        ("prompt_field: 7", "prompt_field"),
        ("run_name: 2024-05-01", "run_name"),
        ("score: yes", "score"),
    ):
        path.write_text(f"output_dir: x\n{line}\n")
        with pytest.raises(ValueError, match=rf"{name}: expected text, got .*put it in quotes"):
            parse(["--config", str(path)])

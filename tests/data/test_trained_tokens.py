"""Exactly the expected tokens are trained, for every form of data: read from TRL's own preparation and collator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lota.data import checks, dataset, trained_tokens
from lota.data.options import plan_data
from lota.run.options import LotaArguments
from tests.data import tiny

ROW = {"prompt": "a b", "completion": " c d"}
CHAT_ROWS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]},
    {
        "messages": [
            {"role": "user", "content": "d"},
            {"role": "assistant", "content": "e f"},
            {"role": "user", "content": "g"},
            {"role": "assistant", "content": "h"},
        ]
    },
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("base"))


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(base: Path, tmp_path: Path, options: dict[str, Any], **config: Any) -> SFTTrainer:
    """A trainer on what the recipes load, without ranks."""
    args = LotaArguments(model_name_or_path=str(base), **options)
    settings = {"max_length": 12, "report_to": [], "bf16": False, "gradient_checkpointing": False} | config
    trl_config = SFTConfig(str(tmp_path / "out"), use_cpu=True, **settings)
    sets = dataset.load(plan_data(args), seed=1)
    checks.check(sets, str(base), "main", trl_config)
    return SFTTrainer(
        tiny.model(), args=trl_config, train_dataset=sets.train, processing_class=checks.load_tokenizer(str(base))
    )


def seen(trainer: SFTTrainer) -> list[str]:
    """Every row token by token, what is trained between brackets. The count must agree with the reading."""
    tokenizer = trainer.processing_class
    rows = trained_tokens.first_examples(trainer, 100)
    assert trained_tokens.num_trained_tokens(trainer.train_dataset) == sum(sum(trained) for _, trained in rows)
    return [trained_tokens.pieces(tokenizer, *row).replace("⟦", "[").replace("⟧", "]") for row in rows]


def test_prompt_and_completion(base: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [ROW, {"prompt": "e", "completion": " f"}])
    assert seen(prepared(base, tmp_path, {"train_file": file})) == ["a b [c] [d] [</s>]", "e [f] [</s>]"]
    # The first token is predicted from nothing, whatever its label says.
    whole = prepared(base, tmp_path, {"train_file": file}, completion_only_loss=False)
    assert seen(whole) == ["a [b] [c] [d] [</s>]", "e [f] [</s>]"]
    batch = whole.data_collator([whole.train_dataset[k] for k in range(2)])
    assert trained_tokens.trained_positions(batch).int().tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]


def test_text(base: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [{"title": "a", "body": "b c"}])
    options = {"train_file": file, "text_template": "{title} {body}"}
    assert seen(prepared(base, tmp_path, options)) == ["a [b] [c] [</s>]"]


def test_csv_is_text_as_it_stands(base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('question,answer,n\n"a b",c,007\nd,NA,1e3\n', encoding="utf-8")
    options = {
        "train_file": str(tmp_path / "t.csv"),
        "prompt_field": "question",
        "completion_template": " {answer} {n}",
    }
    assert dataset.load(plan_data(LotaArguments(**options))).train.to_list() == [
        {"prompt": "a b", "completion": " c 007"},
        {"prompt": "d", "completion": " NA 1e3"},
    ]
    assert seen(prepared(base, tmp_path, options)) == ["a b [c] [<unk>] [</s>]", "d [<unk>] [<unk>] [</s>]"]


def test_parquet_holds_conversations(base: Path, tmp_path: Path) -> None:
    Dataset.from_list(CHAT_ROWS).to_parquet(tmp_path / "t.parquet")
    options = {"train_file": str(tmp_path / "t.parquet")}
    assert seen(prepared(base, tmp_path, options, assistant_only_loss=True, max_length=None)) == [
        "<user> a b <end> <assistant> [c] [<end>]",
        "<user> d <end> <assistant> [e] [f] [<end>] <user> g <end> <assistant> [h] [<end>]",
    ]
    assert seen(prepared(base, tmp_path, options, max_length=5)) == [
        "<user> [a] [b] [<end>] [<assistant>]",
        "<user> [d] [<end>] [<assistant>] [e]",
    ]


def test_names_of_other_data_sets_and_a_list_in_json(base: Path, tmp_path: Path) -> None:
    rows = [{"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "t.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    options = {"train_file": str(tmp_path / "t.json"), "messages_field": "talk"}
    assert seen(prepared(base, tmp_path, options, assistant_only_loss=True)) == [
        "<user> a <end> <assistant> [b] [<end>]"
    ]


def test_prompt_and_completion_as_chat_need_no_marks(tmp_path: Path) -> None:
    unmarked = tiny.CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    base = tiny.save(tmp_path / "base", unmarked)
    options = {"train_file": lines(tmp_path / "t.jsonl", [ROW]), "completion_template": "{completion}", "as_chat": True}
    assert seen(prepared(base, tmp_path, options)) == ["<user> a b <end> <assistant> [c] [d] [<end>]"]


def test_packed_texts_keep_their_boundaries(base: Path, tmp_path: Path) -> None:
    rows = [ROW, {"prompt": "e f", "completion": " g"}, {"prompt": "h", "completion": " i j"}]
    options = {"train_file": lines(tmp_path / "t.jsonl", rows)}
    whole = prepared(base, tmp_path, options, packing=True, completion_only_loss=False)
    assert seen(whole) == ["a [b] [c] [d] [</s>] e [f] [g] [</s>]", "h [i] [j] [</s>]"]
    batch = whole.data_collator([whole.train_dataset[0]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]] and "attention_mask" not in batch
    assert seen(prepared(base, tmp_path, options, packing=True)) == [
        "a b [c] [d] [</s>] e f [g] [</s>]",
        "h [i] [j] [</s>]",
    ]
    # Cut anywhere: the second row begins with the end of an answer, whose first token nothing predicts.
    wrapped = {"packing": True, "packing_strategy": "wrapped", "max_length": 7}
    assert seen(prepared(base, tmp_path, options, **wrapped)) == [
        "a b [c] [d] [</s>] e f",
        "g [</s>] h [i] [j] [</s>]",
    ]


def test_packed_conversations_train_the_answers_alone(base: Path, tmp_path: Path) -> None:
    options = {"train_file": lines(tmp_path / "t.jsonl", CHAT_ROWS)}
    trainer = prepared(base, tmp_path, options, packing=True, assistant_only_loss=True, max_length=20)
    assert seen(trainer) == [
        "<user> d <end> <assistant> [e] [f] [<end>] <user> g <end> <assistant> [h] [<end>] "
        "<user> a b <end> <assistant> [c] [<end>]"
    ]


def test_a_mixture_of_a_table_and_conversations(base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("q,a\na,b\nc,d\ne,f\n", encoding="utf-8")
    table = {"train_file": str(tmp_path / "t.csv"), "prompt_field": "q", "completion_field": "a", "as_chat": True}
    talk = {"train_file": lines(tmp_path / "t.jsonl", CHAT_ROWS)}
    mixture = [table | {"weight": 3}, talk | {"weight": 1}]
    found = seen(prepared(base, tmp_path, {"mixture": mixture}, assistant_only_loss=True, max_length=32))
    tables = {f"<user> {q} <end> <assistant> [{a}] [<end>]" for q, a in ("ab", "cd", "ef")}
    talks = {
        "<user> a b <end> <assistant> [c] [<end>]",
        "<user> d <end> <assistant> [e] [f] [<end>] <user> g <end> <assistant> [h] [<end>]",
    }
    assert len(found) == 4 and set(found) >= tables and len(set(found) & talks) == 1


def test_a_mixture_of_text_and_completions(base: Path, tmp_path: Path) -> None:
    mixture = [
        {"train_file": lines(tmp_path / "a.jsonl", [{"text": "e f"}])},
        {"train_file": lines(tmp_path / "b.jsonl", [ROW])},
    ]
    found = seen(prepared(base, tmp_path, {"mixture": mixture}))
    assert sorted(found) == ["a b [c] [d] [</s>]", "e [f] [</s>]"]


def test_the_examples_mark_what_is_trained(base: Path, tmp_path: Path) -> None:
    trainer = prepared(base, tmp_path, {"train_file": lines(tmp_path / "t.jsonl", [ROW])})
    found = trained_tokens.first_examples(trainer, 8)
    assert trained_tokens.render(trainer.processing_class, found) == (
        "⟦...⟧ is trained; everything else is only read.\n\n" + "-" * 80 + "\n"
        "row 1: 5 tokens, 3 of them trained\na b⟦ c d </s>⟧\n\ntokens: a b ⟦c⟧ ⟦d⟧ ⟦</s>⟧\n"
    )


def test_rows_without_a_trained_token_are_an_error(base: Path, tmp_path: Path) -> None:
    file = lines(tmp_path / "t.jsonl", [ROW, ROW])
    talk = lines(tmp_path / "c.jsonl", CHAT_ROWS)
    for options, config in (
        ({"train_file": file}, {"max_length": 2}),
        ({"train_file": file}, {"max_length": 2, "packing": True}),
        ({"train_file": talk}, {"max_length": 3, "assistant_only_loss": True}),
    ):
        trainer = prepared(base, tmp_path, options, **config)
        with pytest.raises(ValueError, match=r"no token of any row is trained: max_length cut"):
            trained_tokens.num_trained_tokens(trainer.train_dataset)

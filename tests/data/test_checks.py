"""What TRL would train wrongly, or end on after the model is loaded, is refused before, with the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from lota.data import dataset
from lota.data.checks import check
from lota.data.options import SourceArguments, plan_data
from tests.data import tiny
from tests.data.test_tokenizer import folder_with, trained

UNMARKED = tiny.CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LOOSE = tiny.CHAT.replace("' <end>' }}{% endgeneration %}{{ ' ' }}", "' <end> ' }}{% endgeneration %}")
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASSISTANT, COMPLETION = {"assistant_only_loss": True}, {"completion_only_loss": True}
TEXT, PAIR, MESSAGES = {"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": TALK}
Rows = list[dict[str, Any]]


def checked(
    base: Path | str, tmp_path: Path, rows: list[dict[str, Any]], as_chat: bool = False, **config: Any
) -> list[str]:
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = SourceArguments(model_name_or_path=str(base), train_file=[str(file)], as_chat=as_chat)
    settings = {"report_to": [], "bf16": False, "use_cpu": True} | config
    return check(dataset.load(plan_data(args)), str(base), "main", SFTConfig(str(tmp_path / "out"), **settings))


@pytest.mark.parametrize(
    ("template", "rows", "config", "message"),
    [
        (None, [MESSAGES], {}, r"has no chat template: give chat_template_path: FILE\.jinja, or plain_chat"),
        (UNMARKED, [MESSAGES], ASSISTANT, "marks the assistant's turns with {% generation %}.*as_chat"),
        (LOOSE, [MESSAGES], ASSISTANT, "the marks do not come out right.*leave blanks at its ends out"),
        (tiny.CHAT, [MESSAGES, {"messages": TALK[:1]}], ASSISTANT, "row 2 has no turn of the assis"),
        (tiny.CHAT, [PAIR], ASSISTANT, "needs conversations: remove it .*as_chat: true"),
        (tiny.CHAT, [MESSAGES], COMPLETION, "the rows are messages: remove it.*assistant_only_loss"),
        (tiny.CHAT, [TEXT], COMPLETION, "the rows are text: remove it"),
        (tiny.CHAT, [MESSAGES], {"chat_template_path": "some/model"}, "must be a .jinja file.*resize the model"),
        (tiny.CHAT, [MESSAGES], {"chat_template_path": "none.jinja"}, "no such file: none.jinja"),
        (tiny.CHAT, [PAIR], {"chat_template_path": "plain_chat"}, "would be ignored: the rows are no conv"),
        (tiny.CHAT, [TEXT], {"dataset_text_field": "body"}, "dataset_text_field is called text_field here"),
        (tiny.CHAT, [TEXT], {"packing": True, "max_length": None}, "packing fills rows of max_length tokens"),
        (tiny.CHAT, [PAIR], {"eval_strategy": "steps", "eval_steps": 5}, "so eval_strategy would be ignored"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, template: str | None, rows: Rows, config: dict[str, Any], message: str) -> None:
    base = tiny.save(tmp_path / "base", template)
    with pytest.raises(ValueError, match=message):
        checked(base, tmp_path, rows, **config)


def test_notes(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "base")
    assert checked(base, tmp_path, [MESSAGES], assistant_only_loss=True) == []
    assert checked(base, tmp_path, [PAIR]) == [] == checked(base, tmp_path, [TEXT])
    assert "users' turns too; assistant_only_loss: true" in checked(base, tmp_path, [MESSAGES])[0]
    assert "texts are kept apart" in checked(base, tmp_path, [TEXT], packing=True)[0]


@pytest.fixture
def pieces(tmp_path: Path) -> str:
    """A base with a SentencePiece model of Llama's kind, and no chat template."""
    model = trained("bpe", "identity", byte_fallback=True, remove_extra_whitespaces=False)
    return str(folder_with(tmp_path / "pieces", model).model_name_or_path)


def test_a_base_without_a_template_takes_the_plain_one(pieces: str, tmp_path: Path) -> None:
    plain = "plain_chat"
    assert checked(pieces, tmp_path, [MESSAGES], assistant_only_loss=True, chat_template_path=plain) == []
    assert checked(pieces, tmp_path, [PAIR], as_chat=True, chat_template_path=plain) == []


def test_a_turn_whose_end_is_not_trained_is_said(pieces: str, tmp_path: Path) -> None:
    template = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    template = template.replace("{% generation %}", "{% if m['role'] == 'assistant' %}{% generation %}")
    template = template.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}")
    (tmp_path / "t.jinja").write_text(template, encoding="utf-8")
    options = {"assistant_only_loss": True, "chat_template_path": str(tmp_path / "t.jinja")}
    assert "may not learn to stop" in checked(pieces, tmp_path, [MESSAGES], **options)[0]


def test_a_tokenizer_without_offsets_has_no_assistant_masks(tmp_path: Path) -> None:
    base = folder_with(tmp_path / "base", trained("unigram", "nmt_nfkc"), chat_template=tiny.CHAT).model_name_or_path
    assert base is not None
    with pytest.raises(ValueError, match=r"this tokenizer\.model cannot be turned into one: use prompt and completion"):
        checked(base, tmp_path, [MESSAGES], assistant_only_loss=True)
    assert checked(base, tmp_path, [PAIR], as_chat=True) == []

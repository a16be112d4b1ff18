"""Answers depend on the model, the prompt and the options: not on generation_config.json, nor on the batch."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from lota.evaluate.answer_loss import check_causal
from lota.evaluate.generate import Decoding, _may_pad, write_answers
from lota.evaluate.metrics import last_number, marked_number
from tests import architectures
from tests.data.test_one_tokenizer import _characters
from tests.delivery.architecture_table import load

PROMPTS = ["Q: what is it", "a", "Q: 12", "bcd efg", "Q: 1 2 3 4 5"]


class Tokenizer:
    """Characters, as the rows' tests have them."""

    pad_token_id, eos_token_id, eos_token = 0, 2, "</s>"

    def __init__(self) -> None:
        self._inner = _characters()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._inner.encode(text).ids}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def make(name: str, folder: Path) -> Any:
    architectures.make_model(name).save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt2", "falcon_mamba", "qwen3_next", "bloom"])
def test_answers_do_not_depend_on_the_batch(tmp_path: Path, name: str) -> None:
    model = make(name, tmp_path).float()
    tokenizer, rows = Tokenizer(), [{"prompt": prompt, "completion": ""} for prompt in PROMPTS]
    together = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=6), batch_rows=5)
    alone = [write_answers(model, tokenizer, [row], Decoding(max_new_tokens=6))[0] for row in rows]
    assert together == alone


def test_padding_is_measured(tmp_path: Path) -> None:
    ids = [Tokenizer()(prompt)["input_ids"] for prompt in PROMPTS]
    assert _may_pad(make("llama", tmp_path / "llama"), ids, 0)
    model = make("llama", tmp_path / "other")
    original = model.forward
    # A model that does not look at the mask: padding changes what it says.
    model.forward = lambda *args, attention_mask=None, position_ids=None, **options: original(*args, **options)
    model._validate_model_kwargs = lambda _: None
    assert not _may_pad(model, ids, 0)


def test_nothing_of_the_models_own_settings_counts(tmp_path: Path) -> None:
    model, tokenizer = make("llama", tmp_path), Tokenizer()
    rows = [{"prompt": prompt, "completion": ""} for prompt in PROMPTS]
    plain = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8))
    first = [int(answer.split()[0]) for answer in plain if answer]
    own = GenerationConfig(
        suppress_tokens=first, bad_words_ids=[[token] for token in first], begin_suppress_tokens=first,
        forced_eos_token_id=2, exponential_decay_length_penalty=(1, 9.0), min_new_tokens=8, max_length=3,
        repetition_penalty=9.0, do_sample=True, temperature=9.0, num_beams=3, length_penalty=5.0, eos_token_id=[2, 111],
    )  # fmt: skip
    model.generation_config = own
    ended = write_answers(model, tokenizer, rows, Decoding(max_new_tokens=8))
    assert model.generation_config is own
    for answer, expected in zip(ended, plain, strict=True):
        ids, wanted = answer.split(), expected.split()
        stop = wanted.index("111") + 1 if "111" in wanted else len(wanted)  # its end tokens alone count
        assert ids[:stop] == wanted[:stop]


def test_a_model_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    for name in ("llama", "mamba", "gpt2", "qwen3_moe"):
        check_causal(make(name, tmp_path / name))
    with pytest.raises(ValueError, match=r"BertLMHeadModel is not causal.*is_decoder: true"):
        check_causal(make("bert", tmp_path / "bert"))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 9{,}500.", "9500"),
        (r"\boxed{1{,}234{,}567}", "1234567"),
        ("It falls to \N{MINUS SIGN}7.5 degrees", "-7.5"),
        ("5\N{MINUS SIGN}3", "3"),
        ("$1,000", "1000"),
        ("none", None),
    ],
)
def test_numbers_as_they_are_typeset(text: str, number: str | None) -> None:
    wanted = None if number is None else Decimal(number)
    assert last_number(text) == wanted
    if number is not None and "5\N{MINUS SIGN}" not in text:
        assert marked_number(f"so #### {text}") == wanted


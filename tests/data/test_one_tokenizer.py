"""Training, preferences and evaluation see the same ids, and begin the answer at the same one, with any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from lota.data.tokenizer import encode, encode_prompt, load_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
LETTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "▁"]
TEMPLATE = (
    "{% if tools %}[tools {{ tools | length }}]{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def _vocabulary(*more: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *LETTERS, *more]))}


def _characters() -> Tokenizer:
    return Tokenizer(models.BPE(vocab=_vocabulary(), merges=[], unk_token="<unk>"))


def _merging() -> Tokenizer:
    """Tokens that merge over the place where the answer begins."""
    pairs = [(":", " "), (": ", "4"), (" ", "b"), ("a", "b")]
    return Tokenizer(models.BPE(vocab=_vocabulary(*map("".join, pairs)), merges=pairs, unk_token="<unk>"))


def _bytes() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _unigram() -> Tokenizer:
    pieces = [(token, -1.0 - 0.01 * number) for token, number in _vocabulary("▁Q", "▁4").items()]
    made = Tokenizer(models.Unigram(pieces, unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace()
    return made


def _words() -> Tokenizer:
    made = Tokenizer(models.WordPiece(_vocabulary(*(f"##{letter}" for letter in LETTERS)), unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def _with(template: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        made = _characters()
        ids = [(token, number) for number, token in enumerate(SPECIAL)]
        made.post_processor = processors.TemplateProcessing(
            single=template, pair=f"{template} {template.replace('$A', '$B')}", special_tokens=ids
        )
        return made

    return make


def _both() -> Tokenizer:
    made = _merging()
    made.post_processor = processors.Sequence([processors.ByteLevel(), _with("<s> $A </s>")().post_processor])
    return made


MAKE: dict[str, Callable[[], Tokenizer]] = {
    "characters": _characters,
    "merging over the boundary": _merging,
    "bytes": _bytes,
    "unigram": _unigram,
    "words": _words,
    "begins": _with("<s> $A"),
    "ends by itself": _with("$A </s>"),
    "begins, merges and ends by itself": _both,
}
ROWS: list[dict[str, Any]] = [
    {"prompt": "Q: ", "completion": "4"},
    {"prompt": "Q:", "completion": " 42b"},
    {"prompt": "a", "completion": "b"},
    {"prompt": "Q: é?\n", "completion": "4</s>"},  # an answer that brings its end
    {"prompt": "", "completion": "ab"},
]
CHATS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": answer}]}
    for text, answer in (("Q: ", "4"), ("a", "b"))
]


@pytest.fixture(scope="module", params=MAKE)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(
        tokenizer_object=MAKE[request.param](),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    made.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made) + 4, **sizes)).save_pretrained(folder)
    return folder


def _options(folder: Path) -> dict[str, Any]:
    return {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}


@pytest.mark.parametrize("rows", [ROWS, CHATS], ids=["text", "chat"])
def test_training_and_evaluation_agree(base: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    tokenizer = load_tokenizer(str(base))
    model = LlamaForCausalLM.from_pretrained(base)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**_options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        ids, num_prompt = encode(tokenizer, row)
        assert ids == list(prepared["input_ids"])
        trained = [label != -100 for label in prepared["labels"]]
        assert trained == [place >= num_prompt for place in range(len(ids))]
        assert ids[-1] == 2 and ids.count(2) == (1 if rows is ROWS else 2)  # one end, at the end
        assert isinstance(row["prompt"], list) or 2 not in encode_prompt(tokenizer, row)


def test_preferences_and_evaluation_agree(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    model = LlamaForCausalLM.from_pretrained(base)
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "zz"} for row in ROWS if row["prompt"]]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**_options(tmp_path)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for row, prepared in zip(rows, trainer.train_dataset, strict=True):
        for answer in ("chosen", "rejected"):
            ids, num_prompt = encode(tokenizer, {"prompt": row["prompt"], "completion": row[answer]})
            assert ids == [*prepared["prompt_ids"], *prepared[f"{answer}_ids"]]
            assert len(prepared["prompt_ids"]) <= num_prompt


def test_tools_reach_the_template(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    plain, _ = encode(tokenizer, CHATS[1])
    shown, num_prompt = encode(tokenizer, CHATS[1] | {"tools": '[{"name": "search"}, {"name": "add"}]'})
    extra = tokenizer("[tools 2]", add_special_tokens=False)["input_ids"]
    assert len(plain) < len(shown) and len(extra) <= num_prompt + 1

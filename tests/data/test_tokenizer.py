"""A base's tokenizer gives SentencePiece's own ids where that is all there is, and needs no row that is not there."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lota.data.options import SourceArguments
from lota.data.sentencepiece_tokenizer import wrap_sentencepiece
from lota.data.tokenizer import load_tokenizer
from tests.data import tiny

ALPHABET = [
    *"abcdefghouxyz \n\t\r.,?'<>",
    *("  ", "   ", "é", "e\u0301", "ß", "漢字", "한", "🙂", "▁", "\u200d", "\ufeff", "\u00a0", "\u3000", "\x00"),
    *("ﬁ", "Ⅷ", "½", "ﷺ", "<0x41>", "the ", "then", " other"),
]


def trained(kind: str, normalization: str, **options: Any) -> bytes:
    """A serialized SentencePiece model of a few made words."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdeghotuéß漢", k=rng.randint(2, 6))) for _ in range(150)]
    lines = (" ".join(rng.choices([*words, "the", "then", "other"], k=8)) for _ in range(600))
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=file, model_type=kind, vocab_size=500, hard_vocab_limit=False,
        normalization_rule_name=normalization, num_threads=1, minloglevel=3, **options,
    )  # fmt: skip
    return file.getvalue()


def folder_with(tmp_path: Path, model: bytes, **tokenizer_config: Any) -> SourceArguments:
    """A base whose tokenizer is nothing but tokenizer.model."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tiny.model(reference.get_piece_size()).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    if tokenizer_config:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")
    return SourceArguments(model_name_or_path=str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "normalization", "options", "is_fast"),
    [
        ("bpe", "identity", {"byte_fallback": True, "remove_extra_whitespaces": False}, True),  # Llama, Mistral
        ("bpe", "identity", {"remove_extra_whitespaces": False, "add_dummy_prefix": False}, True),  # Gemma
        ("bpe", "nmt_nfkc", {"byte_fallback": True}, False),
        ("unigram", "nmt_nfkc", {}, False),
        ("unigram", "identity", {"byte_fallback": True, "remove_extra_whitespaces": False}, False),
    ],
    ids=["llama", "gemma", "bpe-normalized", "unigram-normalized", "unigram"],
)
def test_ids_are_sentencepieces_own(
    tmp_path: Path, kind: str, normalization: str, options: dict[str, Any], is_fast: bool
) -> None:
    model = trained(kind, normalization, **options)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = load_tokenizer(str(folder_with(tmp_path, model).model_name_or_path))
    assert tokenizer.is_fast == is_fast
    rng = random.Random(1)
    texts = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 30))) for _ in range(1000)]
    for text in ["", " ", "   x", "x   ", " the", "\n", *texts]:
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], repr(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), repr(text)
    text = " the other then"
    assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))


def test_transformers_alone_gives_other_ids(tmp_path: Path) -> None:
    """Why this exists: when it fails, the class can go."""
    model = trained("bpe", "identity", byte_fallback=True, remove_extra_whitespaces=False)
    folder_with(tmp_path, model)
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert AutoTokenizer.from_pretrained(tmp_path)("the", add_special_tokens=False)["input_ids"] != reference.encode(
        "the"
    )


def test_what_the_config_says_of_the_tokenizer_is_kept(tmp_path: Path) -> None:
    model = trained("bpe", "identity", byte_fallback=True, remove_extra_whitespaces=False)
    added = {"500": {"content": "<|end|>", "special": True}}
    args = folder_with(
        tmp_path, model, tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=True,
        eos_token={"content": "</s>"}, chat_template="{{ x }}",
    )  # fmt: skip
    tokenizer = load_tokenizer(str(args.model_name_or_path))
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    # All but the end of every text, which training puts there itself.
    assert tokenizer("the")["input_ids"] == reference.encode("the") and tokenizer.chat_template == "{{ x }}"
    assert tokenizer.pad_token == "</s>"  # this model has no piece for padding

    size = reference.get_piece_size()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"gives '<\|end\|>' the id 500, which does not follow|no embedding row"):
        load_tokenizer(str(args.model_name_or_path))
    tiny.model(size + 1).save_pretrained(tmp_path)
    added = {str(size): {"content": "<|end|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    ids = load_tokenizer(str(args.model_name_or_path))("the<|end|>")["input_ids"]
    assert ids == [1, *reference.encode("the"), size]


def test_the_exact_kind_is_saved_as_it_came(tmp_path: Path) -> None:
    args = folder_with(tmp_path, trained("unigram", "nmt_nfkc"), chat_template="{{ x }}")
    tokenizer = load_tokenizer(str(args.model_name_or_path))
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(str(args.model_name_or_path))
    assert type(again) is type(tokenizer) and again.chat_template == "{{ x }}"
    assert again(" the  other")["input_ids"] == tokenizer(" the  other")["input_ids"]
    AutoTokenizer.from_pretrained(tmp_path)  # loads, with ids of its own


def test_the_exact_kind_survives_pickling(tmp_path: Path) -> None:
    import pickle

    tokenizer = wrap_sentencepiece(trained("unigram", "nmt_nfkc"))
    again = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301 - what datasets does to name its cache
    assert again("the other")["input_ids"] == tokenizer("the other")["input_ids"]


def test_a_resized_vocabulary_is_refused_with_the_cure(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    args = SourceArguments(model_name_or_path=str(tiny.save(tmp_path, num_rows=len(tokenizer))))
    load_tokenizer(str(args.model_name_or_path))
    tokenizer.add_tokens(["<tool>", "<think>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"2 tokens for which the model has no embedding row \('<tool>', '<think>'; the model has 20 rows\)"
        r".*resize_token_embeddings.*dense: .*model\.embed_tokens\.weight",
    ):
        load_tokenizer(str(args.model_name_or_path))


def test_padding_needs_no_new_row(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    args = SourceArguments(model_name_or_path=str(tiny.save(tmp_path, num_rows=len(tokenizer))))
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(args.model_name_or_path)).pad_token == "</s>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny.tokenizer().backend_tokenizer, unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a padding nor an end-of-text token: name them"):
        load_tokenizer(str(args.model_name_or_path))

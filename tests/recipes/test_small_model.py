"""The model made on the spot: its tokenizer gives SentencePiece's ids, its world repeats, its cache is whole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes import demo_base, small_model
from recipes.demo_world import NEW_TEMPLATES, World, WorldConfig, fill
from recipes.small_model import BEGIN, END, PADDING, SmallModelConfig, train_tokenizer, wrap_sentencepiece

TINY_WORLD = WorldConfig(num_sentences=200, num_translations=200, num_train=20, num_test=10)
TINY_MODEL = SmallModelConfig(vocab_size=320, hidden_size=32, num_layers=1, steps=2, batch_rows=8)


def test_ids_are_sentencepieces_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protos = []
    monkeypatch.setattr(
        small_model, "wrap_sentencepiece", lambda proto: protos.append(proto) or wrap_sentencepiece(proto)
    )
    tokenizer = train_tokenizer(World(TINY_WORLD).plain_text(), 400)
    reference = sentencepiece.SentencePieceProcessor(model_proto=protos[0])
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    alphabet = [*"abcdefghouxyz \n\t.,?'", "  ", "é", "ß", "漢", "🙂", "▁", "\u200d", "ﬁ", "the red fox ", "né"]
    rng = random.Random(0)
    texts = ["", " ", "   x", "x   ", *("".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(1000))]
    for text in texts:
        expected = [BEGIN, *reference.encode(text)]
        assert tokenizer(text)["input_ids"] == expected, repr(text)
        assert reloaded(text)["input_ids"] == expected, repr(text)
        assert reloaded.decode(expected, skip_special_tokens=True).strip() == reference.decode(expected[1:]).strip()
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (BEGIN, END, PADDING)


def test_world_is_reproducible_and_its_streams_differ() -> None:
    world = World(TINY_WORLD)
    assert world.plain_text() == World(TINY_WORLD).plain_text()
    assert world.new_rows("train", 50) == World(TINY_WORLD).new_rows("train", 50)
    assert world.new_rows("train", 50) != world.new_rows("test", 50)
    words = [*world.selan.values(), *world.vokar.values(), *world.selan]
    assert len(set(words)) == len(words)
    row = fill(NEW_TEMPLATES, world.new_rows("train", 1))[0]
    assert row["prompt"].startswith("say in vokar : the ") and row["completion"].startswith(" ")


def test_base_is_made_once_and_appears_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: list[str] = []
    folder = demo_base.prepare(TINY_WORLD, TINY_MODEL, said.append)
    assert folder.parent == tmp_path / "lota" and list(folder.parent.iterdir()) == [folder]
    assert str(AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").dtype) == "torch.bfloat16"
    assert demo_base.prepare(TINY_WORLD, TINY_MODEL, said.append) == folder
    assert "found in" in said[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(small_model, "pretrain", fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        demo_base.prepare(WorldConfig(seed=8), TINY_MODEL, said.append)
    assert list(folder.parent.iterdir()) == [folder]

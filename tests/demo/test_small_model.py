"""The model made on the spot: its tokenizer keeps its ids on disk, its world repeats, its cache is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lota.demo import base, small_model
from lota.demo.small_model import BEGIN, END, PADDING, SmallModelConfig, train_tokenizer
from lota.demo.world import NEW_TEMPLATES, World, WorldConfig, fill

TINY_WORLD = WorldConfig(num_sentences=200, num_translations=200, num_train=20, num_test=10)
TINY_MODEL = SmallModelConfig(vocab_size=320, hidden_size=32, num_layers=1, steps=2, batch_rows=8)


def test_the_tokenizer_is_saved_with_its_ids(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(World(TINY_WORLD).plain_text(), 400)
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", " ", "  the red fox", "né\n漢 🙂"):
        assert reloaded(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)
        assert reloaded(text)["input_ids"][0] == BEGIN
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
    folder = base.prepare(TINY_WORLD, TINY_MODEL, said.append)
    assert folder.parent == tmp_path / "lota" and list(folder.parent.iterdir()) == [folder]
    assert str(AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").dtype) == "torch.bfloat16"
    assert base.prepare(TINY_WORLD, TINY_MODEL, said.append) == folder
    assert "found in" in said[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("out of disk")

    monkeypatch.setattr(small_model, "pretrain", fail)
    with pytest.raises(RuntimeError, match="out of disk"):
        base.prepare(WorldConfig(seed=8), TINY_MODEL, said.append)
    assert list(folder.parent.iterdir()) == [folder]

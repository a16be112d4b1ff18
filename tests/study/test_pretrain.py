"""A base whose pretraining was stopped and resumed is the base of an uninterrupted one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lota.demo.small_model import train_tokenizer
from lota.study.pretrain import BaseConfig, pretrain
from lota.study.world import World, WorldConfig


def test_stopped_and_resumed(tmp_path: Path) -> None:
    texts = list(World(WorldConfig()).pretraining(300))
    tokenizer = train_tokenizer(texts, 400)
    config = BaseConfig(
        400, hidden_size=32, num_layers=1, num_heads=2, max_length=32, steps=6, batch_rows=4, save_every=2
    )
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    pretrain(config, tokenizer, texts, tmp_path / "whole", lambda _: None)

    def stop(line: str) -> None:
        if "step 4 saved" in line:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pretrain(config, tokenizer, texts, tmp_path / "stopped", stop)
    assert (tmp_path / "stopped" / "partial.safetensors").is_file()
    pretrain(config, tokenizer, texts, tmp_path / "stopped", lambda _: None)
    assert not (tmp_path / "stopped" / "partial.safetensors").exists()
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

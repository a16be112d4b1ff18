"""Models that the library makes for itself are whole ones, whatever ZeRO-3 configuration a Trainer has registered."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from lota.architecture import build_on_meta, without_zero3
from lota.checkpoint_keys import filled_names, missing_names

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16}


def test_a_registered_configuration_is_set_aside_and_put_back(tmp_path: Path) -> None:
    LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    registered = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    model = build_on_meta(tmp_path)
    assert isinstance(model, LlamaForCausalLM)
    assert all(type(param) is torch.nn.Parameter and param.numel() > 0 for param in model.parameters())
    with without_zero3():
        assert not is_deepspeed_zero3_enabled()
    assert is_deepspeed_zero3_enabled()
    del registered  # transformers holds it weakly
    assert not is_deepspeed_zero3_enabled()


def test_what_a_checkpoint_fills() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    names = [name for name, _ in model.named_parameters()]
    assert filled_names(model, names) == {name: name for name in names}
    assert missing_names(model, names) == []
    assert missing_names(model, names[1:]) == names[:1]
    assert missing_names(model, [*names[1:], "lm_head.weight"]) == [], "a tied tensor under its other name"

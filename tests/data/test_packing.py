"""Packed texts give the logits that they give alone, for every model that the recipes let pack."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lota.data.packing import KEEP_APART, check_packing

TEXTS = [[4, 5, 6, 7, 8, 2], [9, 10, 11, 12], [5, 4, 3]]
# Names that only some models read; a window shorter than a text, and layers enough for one of every kind.
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 3,
    "num_local_experts": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "rotary_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def difference(model_type: str) -> float:
    """The largest of any logit between texts packed by TRL's collator and the same texts alone."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    row = {"input_ids": [token for text in TEXTS for token in text], "seq_lengths": [len(text) for text in TEXTS]}
    batch = {name: value for name, value in collator([row]).items() if name != "labels"}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = [
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            for ids in (torch.tensor([text]) for text in TEXTS)
        ]
    return float((packed - torch.cat(alone)).abs().max())


@pytest.mark.parametrize("model_type", KEEP_APART)
def test_texts_are_kept_apart(model_type: str) -> None:
    assert difference(model_type) < 1e-5  # fp32, sums in another order


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "opt"])
def test_others_mix_them_and_are_refused(model_type: str) -> None:
    assert difference(model_type) > 1e-3
    config = SFTConfig("unused", packing=True, use_cpu=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match=f"not known to keep texts apart in a {model_type} model.*wrapped"):
        check_packing(config, model_type)
    config.packing_strategy = "wrapped"
    assert "texts in a row see each other" in check_packing(config, model_type)[0]

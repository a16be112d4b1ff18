"""`merged: true` on bases whose files name their tensors otherwise than the model: the folder is the trained model.

A mixture of experts, a multimodal base, a tied base and GPT-2; two ranks each, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lota
from lota.delivery.apply import apply_to_checkpoint
from lota.delivery.rewrite import same_bits
from lota.ticket import Ticket
from tests import architectures
from tests.data.test_one_tokenizer import TEMPLATE, _characters
from tests.delivery.architecture_table import load, logits
from tests.delivery.test_apply import load_checkpoint
from tests.train import jobs

SMALL: dict[str, Any] = {
    "vocab_size": architectures.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _gemma3() -> Any:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8, "sliding_window": 8},
        vision_config=vision | {"image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen3_5() -> Any:
    text = SMALL | {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    text |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    vision = {"depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48, "num_heads": 4}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, image_token_id=100)
    return transformers.Qwen3_5ForConditionalGeneration(config)


MAKE: dict[str, Any] = {
    "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4)),
    "gemma3": _gemma3,
    "qwen3_5": _qwen3_5,
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "gpt2": lambda: architectures.make_model("gpt2"),
}


def save_base(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MAKE[kind]().to(torch.bfloat16).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=_characters(), bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    (folder / "LICENSE").write_text("a licence", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", MAKE)
def test_the_merged_folder_is_the_trained_model(ranks: Any, tmp_path: Path, kind: str) -> None:
    base, run = save_base(kind, tmp_path / "base"), tmp_path / "run"
    rows = [{"prompt": f"Q: {number}", "completion": f" {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    (tmp_path / "chat.jinja").write_text(TEMPLATE, encoding="utf-8")
    argv = ["--model_name_or_path", str(base), "--train_file", str(tmp_path / "rows.jsonl"), "--output_dir", str(run)]
    argv += ["--score", "gradient", "--calibration_steps", "1", "--max_steps", "1", "--density", "0.05"]
    argv += ["--per_device_train_batch_size", "2", "--bf16", "true", "--max_length", "64", "--learning_rate", "1e-2"]
    argv += ["--report_to", "none", "--merged", "true", "--as_chat", "true"]
    argv += ["--chat_template_path", str(tmp_path / "chat.jinja")]
    ranks(2).run(jobs.run_recipe, "train_lota", argv)

    ticket = Ticket.load(run / "ticket")
    assert ticket.mask.frozen and ticket.num_changed and ticket.provenance["class"]
    live = load(base)
    before = logits(live)
    lota.apply_(live, ticket)
    assert torch.equal(logits(load(run / "merged")), logits(live)) and not torch.equal(before, logits(live))
    apply_to_checkpoint(base, [ticket], tmp_path / "applied")
    one, other = load_checkpoint(run / "merged"), load_checkpoint(tmp_path / "applied")
    stored = load_checkpoint(base)
    assert one.keys() == other.keys() == stored.keys()
    assert all(same_bits(one[name], other[name]) for name in one)
    changed = sum(int((one[name] != stored[name]).sum()) for name in stored)
    assert changed == ticket.num_changed
    for name in ("config.json", "generation_config.json", "tokenizer.json", "LICENSE"):
        if (base / name).is_file():
            assert (run / "merged" / name).read_bytes() == (base / name).read_bytes(), name
    assert transformers.AutoTokenizer.from_pretrained(run / "merged").chat_template == TEMPLATE

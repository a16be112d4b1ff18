"""One calibration and one sparse step on many architectures: exact counts, frozen bits alone, active ones moved."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import lota
from tests.zero.cases import gathered

COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
DECODER = COMMON | {"intermediate_size": 40, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", DECODER),
    "llama-tied": ("LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", DECODER),
    "qwen3": ("Qwen3Config", DECODER | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", DECODER | {"head_dim": 8}),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "mixtral": ("MixtralConfig", DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3MoeConfig", DECODER | EXPERTS | {"head_dim": 8}),
}


def _one_step(case: str, block: Any, density: float) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    import deepspeed
    import transformers

    kind, settings = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    deepspeed_config = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5000},
    }
    with block as run:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config)
        ids = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        after = gathered(engine.module)
        result = run.mask() if hasattr(run, "mask") and callable(run.mask) else run.report()
        engine.destroy()
    gc.collect()
    return result, before, after


def _calibrate_and_train(case: str, density: float) -> dict[str, Any]:
    mask, *_ = _one_step(case, lota.calibration_zero3(score="gradient", density=density), density)
    report, before, after = _one_step(case, lota.sparse_zero3(mask), density)
    moved = {name: after[name] != before[name] for name in before}
    outside = {
        name: int((changed & ~mask.dense(name)).sum() if name in mask.names else changed.sum())
        for name, changed in moved.items()
    }
    return {
        "mask": mask,
        "report": report,
        "moved": sum(int(changed.sum()) for changed in moved.values()),
        "outside": {name: count for name, count in outside.items() if count},
        "shapes": {name: tuple(tensor.shape) for name, tensor in before.items()},
    }


@pytest.mark.parametrize("case", CASES)
def test_architecture(ranks, case):
    for result in ranks(2).run(_calibrate_and_train, case, 0.05):
        mask = result["mask"]
        eligible = [name for name in result["shapes"] if name in mask.names]
        assert mask.eligible == sum(torch.Size(result["shapes"][name]).numel() for name in eligible)
        assert mask.num_active == result["report"]["num_active"] == round(0.05 * mask.eligible)
        assert not result["outside"]
        assert result["moved"] > 0.8 * mask.num_active
        assert not any(part in name for name in mask.names for part in ("embed", "wte", "wpe", "lm_head", "norm"))
        if case in ("mixtral", "qwen3-moe"):
            assert any(len(mask.shape(name)) == 3 for name in mask.names), "stacked experts take part"

"""Tiny models of every causal architecture that transformers can make from a few sizes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 112
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "dense_intermediate_size"), 48),
    **dict.fromkeys(("ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank", "rotary_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 16),
    **dict.fromkeys(
        ("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "moe_num_shared_experts"), 1
    ),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("lru_width", "attention_window_size", "sliding_window"), 32),
    **dict.fromkeys(("num_codebooks", "hidden_size_per_layer_input"), 2),
    "mamba_expand": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def names() -> list[str]:
    """The model types that transformers has a causal language model for."""
    return sorted({kind.model_type for kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING})


def make_config(name: str) -> Any:
    """A configuration of tiny sizes; those of its parts likewise."""
    kind = transformers.CONFIG_MAPPING[name]
    return kind(**_sizes(kind) | _OWN.get(name, {}))


def _sizes(kind: Any) -> dict[str, Any]:
    known = kind().to_dict()
    made = {key: value for key, value in SIZES.items() if key in known}
    for part, owner in (getattr(kind, "sub_configs", None) or {}).items():
        if hasattr(owner, "model_type") and "vision" not in part and "audio" not in part:
            made[part] = _sizes(owner)
    return made


_LATENT = ("axk1", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3", "youtu")
_LINEAR = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in _LATENT},
    **{name: {"layer_types": ["linear_attention", "full_attention"]} for name in _LINEAR},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}


@torch.no_grad()
def make_model(name: str, seed: int = 0) -> Any:
    """The causal language model, in bf16, with weights large enough that every token matters."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(make_config(name)).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0, 0.1)
    return model.eval()


def check_runs(name: str, ids: torch.Tensor) -> None:
    """An exception unless the tiny model is tiny, and runs on tokens alone."""
    with torch.device("meta"):
        size = sum(
            parameter.numel()
            for parameter in transformers.AutoModelForCausalLM.from_config(make_config(name)).parameters()
        )
    if size > 3_000_000:
        raise ValueError(f"{name} is large: {size} parameters")
    with torch.no_grad():
        make_model(name)(input_ids=ids)

"""Exactly the weight matrices of attention and MLP blocks are eligible, on real models; patterns change that."""

from __future__ import annotations

import pytest
import torch
import transformers

from lota.selection import eligible

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
ATTENTION = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight"]
MLP = ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION_ENTRIES = 16 * 16 + 2 * 8 * 16 + 16 * 16
MLP_ENTRIES = 3 * 16 * 32
FAMILIES = {
    "Llama": (SMALL, ATTENTION + MLP, ATTENTION_ENTRIES + MLP_ENTRIES),
    "Mistral": (SMALL, ATTENTION + MLP, ATTENTION_ENTRIES + MLP_ENTRIES),
    "Qwen3": (SMALL, ATTENTION + MLP, ATTENTION_ENTRIES + MLP_ENTRIES),  # its q_norm and k_norm stay out
    "Gemma": (SMALL, ATTENTION + MLP, ATTENTION_ENTRIES + MLP_ENTRIES),
    "Mixtral": (SMALL | {"num_local_experts": 4}, ATTENTION + EXPERTS, ATTENTION_ENTRIES + 4 * MLP_ENTRIES),
    "Qwen3Moe": (
        SMALL | {"num_experts": 4, "moe_intermediate_size": 32},
        ATTENTION + EXPERTS,
        ATTENTION_ENTRIES + 4 * MLP_ENTRIES,
    ),
    "Qwen2Moe": (
        SMALL | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        ATTENTION + EXPERTS + [f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")],
        ATTENTION_ENTRIES + 5 * MLP_ENTRIES,  # its shared_expert_gate, a router of one row, stays out
    ),
    "GptOss": (SMALL | {"num_local_experts": 4}, ATTENTION + EXPERTS, ATTENTION_ENTRIES + 4 * MLP_ENTRIES),
    "GPT2": (
        {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
        ["attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"],
        12 * 16 * 16,
    ),
}


def _shapes(family: str, **changes) -> dict[str, tuple[int, ...]]:
    config = getattr(transformers, f"{family}Config")(**(FAMILIES[family][0] | changes))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_default(family):
    shapes = _shapes(family)
    chosen = eligible(shapes)
    layers = "transformer.h" if family == "GPT2" else "model.layers"
    _, parts, entries = FAMILIES[family]
    assert sorted(chosen) == sorted(f"{layers}.{layer}.{part}" for layer in range(2) for part in parts)
    assert chosen == [name for name in shapes if name in set(chosen)]
    assert sum(torch.Size(shapes[name]).numel() for name in chosen) == 2 * entries
    assert any(len(shapes[name]) == 3 for name in chosen) == (EXPERTS[0] in parts)


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not_embeddings_and_heads_stay_out(family, tied):
    shapes = _shapes(family, tie_word_embeddings=tied)
    assert ("lm_head.weight" in shapes) == (not tied)
    assert not [
        name for name in eligible(shapes) if "embed" in name or "wte" in name or "wpe" in name or "head" in name
    ]


def test_include_replaces_the_rule_and_exclude_takes_away():
    shapes = _shapes("Llama")
    assert eligible(shapes, include=["*norm.weight", "lm_head.*"]) == [
        name for name in shapes if name.endswith("norm.weight") or name.startswith("lm_head")
    ]
    assert eligible(shapes, include=["model.layers.[1-9]*.mlp.*"], exclude=["*down_proj*"]) == [
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ]
    assert eligible(shapes, exclude=["*.mlp.*"]) == [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ATTENTION
    ]
    assert eligible(_shapes("Mixtral"), include=["*.mlp.gate.weight"]) == [
        f"model.layers.{n}.mlp.gate.weight" for n in (0, 1)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ["*.q_porj.*"]},
            r'include pattern "\*\.q_porj\.\*" matches none of the 21 tensors.*Close: .*q_proj',
        ),
        (
            {"exclude": ["model.layers.0.mlp.gate_proj"]},
            r"exclude pattern .*Close: model\.layers\.0\.mlp\.gate_proj\.weight",
        ),
        ({"include": ["zzz"]}, r"The names look like model\.embed_tokens\.weight"),
        ({"include": "*.mlp.*"}, r'include must be a list of patterns, got the string .* Write \["\*\.mlp\.\*"\]'),
        ({"include": []}, r"expected at least one tensor to train among 21, got none"),
        ({"exclude": ["*"]}, r"`exclude` takes away every weight matrix"),
        (
            {"include": ["*.mlp.*"], "exclude": ["*.mlp.*"]},
            r"every tensor that `include` names is taken away by `exclude`",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        eligible(_shapes("Llama"), **options)


def test_a_model_without_such_blocks_is_refused():
    with pytest.raises(
        ValueError, match="no tensor with two or more dimensions in a block named like attention or MLP"
    ):
        eligible({"encoder.weight": (4, 4), "mlp.bias": (4,)})

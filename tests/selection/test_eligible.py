"""Exactly the weight matrices of the blocks are eligible, on real models; patterns change that, and what is left out is
listed with the pattern that would include it."""

from __future__ import annotations

import pytest
import torch
import transformers

from lota.selection import eligible, left_out, left_out_lines

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
            r"`exclude` takes away every tensor that `include` names",
        ),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        eligible(_shapes("Llama"), **options)


def test_a_model_without_such_blocks_is_refused_with_a_pattern_that_works():
    shapes = {"encoder.weight": (4, 4), "mlp.bias": (4,)}
    with pytest.raises(ValueError, match=r"no weight matrix inside a block was found.*include=\['encoder\.weight'\]"):
        eligible(shapes)
    assert eligible(shapes, include=["encoder.weight"]) == ["encoder.weight"]
    with pytest.raises(ValueError, match=r"no parameter of the model has requires_grad.*requires_grad_\(True\)"):
        eligible({})


def test_default_among_the_patterns_stands_for_the_rule():
    shapes = _shapes("Llama")
    assert set(eligible(shapes, include=["default", "lm_head.*"])) == {*eligible(shapes), "lm_head.weight"}
    assert eligible(shapes, include=["default"], exclude=["*.mlp.*"]) == eligible(shapes, exclude=["*.mlp.*"])


BLOCK = (8, 8)


@pytest.mark.parametrize(
    ("name", "shape", "is_eligible"),
    [
        ("layers.0.mixer.in_proj.weight", BLOCK, True),
        ("layers.0.mixer.conv1d.weight", (8, 1, 4), False),  # depthwise
        ("layers.0.conv.pointwise.weight", (8, 8, 1), True),
        ("layers.0.mixer.A_log", BLOCK, False),
        ("layers.0.experts.gate_up_proj", (2, 8, 8), True),
        ("layers.0.mlp.gate.weight", BLOCK, False),
        ("layers.0.attention.time_mix", (1, 1, 8), False),  # a vector
        ("layers.0.attn.relative_bias.weight", BLOCK, False),
        ("layers.0.extra", BLOCK, True),
        ("some_prelayernorm.encoder.layer.0.output.dense.weight", BLOCK, True),
        ("attention.query.weight", BLOCK, True),  # no list, but a name that says what it is
        ("classifier.0.weight", BLOCK, False),  # a list, but of layers and not of blocks
        ("fc.weight", BLOCK, False),
        ("0.auto_model.pooler.dense.weight", BLOCK, False),
        ("0.auto_model.encoder.layer.0.output.dense.weight", BLOCK, True),
        ("layers.0.mlp.rest.weight", (0, 8), False),
        ("encoder.embed.0.proj.weight", BLOCK, False),
    ],
)
def test_one_tensor(name, shape, is_eligible):
    shapes = {"layers.7.mlp.up.weight": BLOCK, name: shape}
    assert (name in eligible(shapes)) == is_eligible


def test_towers_stay_out_beside_a_language_model_only():
    text, vision = "model.language_model.layers.0.mlp.up.weight", "model.vision_tower.layers.0.mlp.up.weight"
    encoder = "model.encoder.layers.0.mlp.up.weight"
    assert eligible(dict.fromkeys((text, vision, encoder), BLOCK)) == [text]
    assert eligible({vision: BLOCK}) == [vision]
    assert eligible(dict.fromkeys((encoder, "model.decoder.layers.0.mlp.up.weight"), BLOCK))[0] == encoder
    assert eligible(dict.fromkeys((text, vision), BLOCK), include=["default", "model.vision_tower.*"]) == [text, vision]


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GPT2"])
def test_what_is_left_out(family):
    shapes = _shapes(family)
    chosen = eligible(shapes)
    rows = left_out(shapes, chosen)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(row.numel for row in rows) == total - sum(torch.Size(shapes[name]).numel() for name in chosen)
    assert sum(row.share for row in rows) == pytest.approx(
        1 - sum(torch.Size(shapes[name]).numel() for name in chosen) / total
    )
    assert [row.numel for row in rows] == sorted((row.numel for row in rows), reverse=True)
    for row in rows:  # the pattern includes these tensors, and no other kind
        included = eligible(shapes, include=[row.pattern])
        assert sum(torch.Size(shapes[name]).numel() for name in included) == row.numel
        assert not set(included) & set(chosen)
    assert left_out(shapes, shapes) == []


def test_what_is_left_out_in_a_few_lines():
    text = left_out_lines(left_out(_shapes("Mixtral"), eligible(_shapes("Mixtral"))))
    assert len(text) == 3
    assert "embeddings, heads, norms" in text[0] and "model.embed_tokens.weight" in text[0] and "lm_head" in text[0]
    assert "router" in text[1] and 'included by "model.layers.*.mlp.gate.weight"' in text[1]
    assert left_out_lines([]) == []

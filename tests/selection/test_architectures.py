"""Of what is neither embedding, head, norm, router nor tower, at least 95% is eligible, in every architecture; nothing
of those is. Models have the sizes that their configs have by default, on torch's meta device, and what a parameter is
follows from its module. One-dimensional tensors, depthwise kernels and state matrices count as not eligible."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from lota.selection import eligible
from tests.selection.architectures import make, mapping_of, roles

# The 21 architectures that were tried on both blocks.
TRIED = {
    "CAUSAL_LM": "Llama Mamba Mamba2 Jamba Lfm2 Qwen3Next FalconH1 GPT2 Rwkv Gemma3Text DeepseekV3 GptOss",
    "MASKED_LM": "Bert",
    "SEQUENCE_CLASSIFICATION": "Bert ModernBert",
    "SEQ_TO_SEQ_CAUSAL_LM": "T5 Bart",
    "IMAGE_TEXT_TO_TEXT": "Qwen2VL Llava",
    "SPEECH_SEQ_2_SEQ": "Whisper",
    "IMAGE_CLASSIFICATION": "ViT",
}
MORE = {
    "CAUSAL_LM": "Mistral Mixtral Qwen2 Qwen2Moe Qwen3 Qwen3Moe Gemma Gemma2 Gemma3nText Phi Phi3 Phimoe Granite "
    "GraniteMoe GraniteMoeHybrid Bamba Zamba Zamba2 NemotronH FalconMamba Falcon MPT GPTJ CodeGen OPT GPTNeoX GPTNeo "
    "GPTBigCode XLNet StableLm Starcoder2 Persimmon Glm4 Glm4Moe Ernie4_5 Ernie4_5_Moe SmolLM3 xLSTM RecurrentGemma "
    "MiniMax Olmo2 Olmoe Cohere2 Llama4Text KimiLinear LongcatFlash JetMoe Bloom Nemotron HunYuanDenseV1",
    "MASKED_LM": "Albert DebertaV2 Electra Roberta RobertaPreLayerNorm DistilBert Longformer MPNet SqueezeBert",
    "SEQ_TO_SEQ_CAUSAL_LM": "MBart MT5 LED SwitchTransformers M2M100 ProphetNet T5Gemma Qwen2Audio",
    "IMAGE_TEXT_TO_TEXT": "Gemma3 Mllama Idefics2 Idefics3 PaliGemma SmolVLM Qwen2_5_VL Qwen3VLMoe InternVL Blip2 "
    "Florence2 Llama4",
    "SPEECH_SEQ_2_SEQ": "Voxtral GraniteSpeech SeamlessM4T Speech2Text",
    "IMAGE_CLASSIFICATION": "Deit Swin Beit Dinov2 ConvNext",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "Bloom": {"hidden_size": 1024, "n_layer": 2, "n_head": 16},
    "HunYuanDenseV1": {"head_dim": 128},
    "Nemotron": {"head_dim": 128, "num_key_value_heads": 8},
}
CASES = [(task, name) for table in (TRIED, MORE) for task, names in table.items() for name in names.split()]


def _faults(model: Any) -> list[str]:
    """What is wrong with the default choice on this model; empty where nothing is."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    numel = {name: parameter.numel() for name, parameter in model.named_parameters()}
    role, chosen = roles(model), set(eligible(shapes))
    rest = sum(numel[name] for name in shapes if role[name] == "rest")
    share = sum(numel[name] for name in chosen if role[name] == "rest") / max(1, rest)
    faults = [f"{name} is eligible, and it is {role[name]}" for name in chosen if role[name] not in ("rest", "router")]
    return sorted(faults)[:3] + ([f"{share:.1%} of the rest is eligible"] if share < 0.95 else [])


@pytest.mark.parametrize(("task", "name"), CASES)
def test_share(task, name):
    import transformers

    config = next(kind for kind in dir(transformers) if kind.lower() == f"{name}config".lower())
    assert not _faults(make(task, config, SETTINGS.get(name, {})))


def test_their_number():
    assert len(CASES) - sum(len(names.split()) for names in TRIED.values()) >= 40


# A module's role is not clear here: towers that no config of the whole model names (Git, Pi0, VibeVoice), encoders that
# are the model's own (Pix2Struct, PPFormulaNet), a head inside the decoder (FSMT).
UNCLEAR = {"GitConfig", "PI0Config", "VibeVoiceConfig", "VibeVoiceAsrConfig", "Pix2StructConfig", "PPFormulaNetConfig"}
UNCLEAR |= {"FSMTConfig"}


@pytest.mark.slow
def test_every_architecture_that_transformers_makes_from_a_default_config():
    faults, num_made = {}, 0
    for task in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ"):
        for config in list(mapping_of(task)):
            try:
                model = make(task, config.__name__, {})
            except (StrictDataclassError, AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError):
                continue  # its config has no usable defaults, or another package is missing
            num_made += 1
            if config.__name__ not in UNCLEAR and (found := _faults(model)):
                faults[task, config.__name__] = found
    assert num_made > 250 and not faults

"""Models of transformers without memory, and what each of their parameters is by its module, not by its name."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

import torch
from torch import nn

_EMBEDDING = re.compile(r"Embed(dings?|der)?(\dD?)?$|FeatureEncoder|FeatureExtractor|Subsampl")
_HEAD = re.compile(r"Head$|HeadTransform$|PredictionHead|Pooler|Classifier$")
_ROUTER = re.compile(r"Router|TopK|Gate$")
_JOINT = re.compile(r"Projector|Projection$|Connector|Merger|Aligner|Resampler|QFormer|Codec|VQ|Perceiver|MLPAdapter")
_OTHER_SENSES = ("vision_config", "audio_config", "vq_config", "codec_config", "audio_encoder_config", "encoder_config")


def mapping_of(task: str) -> Any:
    """transformers' table of models by config class for a task such as CAUSAL_LM."""
    from transformers.models.auto import modeling_auto

    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING")


def make(task: str, config: str, settings: dict[str, Any]) -> nn.Module:
    """The model of a config class, with its defaults where `settings` say nothing, on torch's meta device."""
    import transformers

    kind = getattr(transformers, config)
    cls = mapping_of(task)[kind]
    with torch.device("meta"):
        return (cls[0] if isinstance(cls, (tuple, list)) else cls)(kind(**settings))


def roles(model: Any) -> dict[str, str]:
    """For every parameter: embedding, head, norm, router, tower, or rest."""
    modules = dict(model.named_modules())
    towers = _towers(model)
    heads = _heads(model)
    return {name: _role(name, modules, towers, heads) for name, _ in model.named_parameters()}


def _role(name: str, modules: dict[str, Any], towers: set[int], heads: set[int]) -> str:
    parts = name.split(".")[:-1]
    path = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    inside = path[1:] or path
    if any(id(module) in towers for module in inside):
        return "tower"
    if any(id(module) in heads for module in inside):
        return "head"
    if any(_is_embedding(module) for module in inside):
        return "embedding"
    if any(_HEAD.search(type(module).__name__) for module in inside):
        return "head"
    is_in_list = any(isinstance(module, (nn.ModuleList, nn.Sequential)) for module in inside)
    if isinstance(inside[-1], (nn.Conv1d, nn.Conv2d)) and not is_in_list:
        return "embedding"  # frames or patches become the first hidden states
    if "Norm" in type(inside[-1]).__name__:
        return "norm"
    return "router" if any(_ROUTER.search(type(module).__name__) for module in inside) else "rest"


def _is_embedding(module: Any) -> bool:
    is_model = hasattr(module, "base_model_prefix")  # JinaEmbeddingsV3Model
    return isinstance(module, nn.Embedding) or (not is_model and bool(_EMBEDDING.search(type(module).__name__)))


def _heads(model: Any) -> set[int]:
    """What is no part of the base model, and output embeddings, also of models inside the model."""
    base = getattr(model, model.base_model_prefix, None) if model.base_model_prefix else None
    found = [] if base is None else [child for child in model.children() if child is not base]
    for module in model.modules():
        with suppress(AttributeError, NotImplementedError):
            found.append(module.get_output_embeddings())
    return {id(module) for module in found}


def _towers(model: Any) -> set[int]:
    """Models inside the model for another sense than text, by their configs, and what joins them to it."""
    config = model.config
    if not hasattr(config, "text_config"):
        return set()
    text = {type(None), type(config), type(config.get_text_config())}
    others = {type(getattr(config, key, None)) for key in _OTHER_SENSES} - text
    found = set()
    for name, module in model.named_modules():
        own = type(getattr(module, "config", None))
        if name and own in others:
            found.add(id(module))
        if others and _JOINT.search(type(module).__name__):
            found.add(id(module))
    return found


def tiny_llava(transformers: Any) -> nn.Module:
    """A language model with a vision tower beside it, small enough to be trained."""
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=5, image_seq_length=4)
    return transformers.LlavaForConditionalGeneration(config)

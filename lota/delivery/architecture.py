"""The model class of a checkpoint, built without weights: names, shapes and kinds of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def build_on_meta(folder: Path, model_facts: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of a folder's config.json, as transformers would load it, on the meta device (no memory, no weights).

    The class is the one that the configuration names, else a causal language model. model_facts: what a ticket says of
    a model with more tensors than its base (see `lota.ticket.Manifest`), whose class and configuration count instead.
    ValueError without config.json.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: expected the folder of a transformers model")
    config = transformers.AutoConfig.from_pretrained(folder)
    for key, value in ((model_facts or {}).get("config") or {}).items():
        is_of_text = key in ("vocab_size", "pad_token_id") and hasattr(config.get_text_config(), key)
        owner = config.get_text_config() if is_of_text else config
        setattr(owner, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        model: nn.Module = (
            transformers.AutoModelForCausalLM.from_config(config) if named is None else named._from_config(config)
        )
    return model


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter name, all names of the same parameter: itself, and those it is tied to."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}

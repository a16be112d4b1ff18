"""Which transformers class and configuration a model has, and that model without weights: names, shapes, modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

TEXT_ENTRIES = ("vocab_size", "pad_token_id")
"""Entries of config.json that multimodal models keep in `text_config`."""


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
    set_entries(config, (model_facts or {}).get("config") or {})
    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"), without_zero3():
        model: nn.Module = (
            transformers.AutoModelForCausalLM.from_config(config) if named is None else named._from_config(config)
        )
    return model


@contextmanager
def without_zero3() -> Iterator[None]:
    """Models that are made in the block are whole ones of this process: the ZeRO-3 configuration that a Trainer
    registered with transformers, for its own model, is set aside. Sharding would wait for ranks that do not take part.
    """
    from transformers.integrations import deepspeed as registry

    reference = registry._hf_deepspeed_config_weak_ref
    registered = None if reference is None else reference()
    registry.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if registered is not None:
            registry.set_hf_deepspeed_config(registered)


def set_entries(config: Any, entries: Mapping[str, Any]) -> None:
    """Give a transformers config other values, in place; those of the text part of a multimodal model go there."""
    for key, value in entries.items():
        is_of_text = key in TEXT_ENTRIES and hasattr(config.get_text_config(), key)
        owner = config.get_text_config() if is_of_text else config
        part = getattr(owner, key, None)
        if isinstance(value, dict) and hasattr(part, "get_text_config"):
            set_entries(part, value)
            continue
        setattr(owner, key, {int(k): v for k, v in value.items()} if key == "id2label" else value)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter name, all names of the same parameter: itself, and those it is tied to."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() for name in names}


def filled_names(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
    """By the name in the model, the checkpoint's key that fills the tensor; None where transformers computes it from
    one or more keys (fused experts, say). Names are found as transformers finds them when it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    prefix = getattr(model, "base_model_prefix", None)
    transforms = get_model_conversion_mapping(model) if hasattr(model, "base_model_prefix") else []
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    targets = {source: entry.target_patterns for entry in converters for source in entry.source_patterns}
    found: dict[str, str | None] = {}
    for key in keys:
        name, source = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state:
            plain, _ = rename_source_key(key, [], [], prefix, state)
            name, source = (plain, None) if plain in state else (name, source)
        if source is None:
            found[name] = key
        else:
            found |= {name.replace(targets[source][0], target): None for target in targets[source]}
    return {name: key for name, key in found.items() if name in state}


def missing_names(model: Any, keys: Collection[str]) -> list[str]:
    """The parameters of a model that no key of a checkpoint fills, and that transformers would make anew; tied ones
    once."""
    filled = filled_names(model, keys)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        names[0]
        for names in {tuple(names): names for names in tied_names(model).values()}.values()
        if not any(name in filled or any(re.search(pattern, name) for pattern in ignored) for name in names)
    ]

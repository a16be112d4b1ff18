"""The model class of a checkpoint, built without weights: names, shapes and kinds of its modules."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def build_on_meta(folder: Path) -> nn.Module:
    """The model of a folder's config.json, as transformers would load it, on the meta device (no memory, no weights).

    The class is the one that the configuration names, else a causal language model. ValueError without config.json.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: expected the folder of a transformers model")
    config = transformers.AutoConfig.from_pretrained(folder)
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

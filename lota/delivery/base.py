"""One check of a base before anything expensive starts: that it is a model, and all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lota.architecture import build_on_meta, check_is_model, check_is_name, read_config
from lota.checkpoint_keys import missing_names
from lota.delivery.model_folder import tensor_files


def check_base(
    model: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    is_whole: bool = True,
    needs_safetensors: bool = False,
) -> Any:
    """Its transformers configuration. ValueError for a path that does not exist, and for a folder that is no model, or
    not all of the causal language model that transformers loads from it.

    is_whole: False where tensors that the base lacks are trained, and stored, whole. needs_safetensors: whether files
    of other formats are of no use. Of a name on the hub only the configuration is looked at.
    """
    check_is_name(model)
    folder = Path(model)
    if not folder.is_dir():
        return read_config(model, revision=revision, trust_remote_code=trust_remote_code)
    check_is_model(folder)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if not any(folder.glob("*.safetensors")) and not needs_safetensors:
        return config
    keys = tensor_files(folder)
    if is_whole and trust_remote_code is False:
        skeleton = build_on_meta(folder, as_causal=True)
        missing = missing_names(skeleton, keys)
        if missing:
            more = f" (and {len(missing) - 1} more tensors)" if missing[1:] else ""
            raise ValueError(
                f"{model} does not hold {missing[0]}{more}, which {type(skeleton).__name__} has: transformers would "
                "fill it with random numbers at every loading, so no two runs would have the same base. Take a base "
                "that has it (or train it whole and store it: dense)"
            )
    return config


def check_numbers(model: torch.nn.Module, name: str) -> None:
    """ValueError where a parameter of a loaded model holds NaN."""
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1 and not parameter.is_meta:
            count = int(torch.isnan(parameter).sum())
            if count:
                raise ValueError(
                    f"{name}: {parameter_name} holds NaN at {count} of {parameter.numel()} entries, so every answer "
                    "would be NaN: copy the model again"
                )

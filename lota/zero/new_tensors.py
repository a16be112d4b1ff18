"""Tensors of a model that its base does not have: a new head, a projector, the rows that a resized embedding gained.

transformers fills what a checkpoint does not hold with random numbers and only logs it. A ticket for such a model would
describe another one: whoever loads the base again gets other random numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from lota.delivery.model_folder import weight_files
from lota.ranks.agree import together
from lota.ticket.rows import whole
from lota.zero.deepspeed import weights

_SAMPLE = 1024
"""Entries of a tensor that are compared with the checkpoint's: numbers made anew differ in nearly all of them."""

_TEXT_ENTRIES = ("vocab_size", "pad_token_id")
_ENTRIES = ("architectures", "id2label", "label2id", "problem_type", *_TEXT_ENTRIES)
"""What of config.json goes with tensors that a base does not have. Multimodal models keep some in `text_config`."""
_OF_THE_RUN = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "text_config")
"""What differs between a base's config.json and a loaded model's, and says nothing about its tensors."""


def new_tensors(model: torch.nn.Module) -> dict[str, int]:
    """By name, how many leading rows the base's checkpoint has of each parameter of which it does not have all.

    The base is what the model was loaded from (`config._name_or_path`), if that is a folder or in the hub's cache; a
    model without one has no new tensors that could be told. Rank 0 looks, at the headers of the files and a thousand
    entries of every tensor. Collective over the world.
    """
    found: dict[str, int] = {}
    with together():
        if dist.get_rank() == 0:
            found = _look(model)
    box: list[Any] = [found]
    dist.broadcast_object_list(box, src=0)
    return dict(box[0])


def refuse_new(new: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], dense: Mapping[str, Any]) -> None:
    """ValueError for a new tensor that is not trained whole, with the cure."""
    named = {name: rows for name, rows in new.items() if not _covers(dense.get(name), rows, shapes[name])}
    if not named:
        return
    patterns = [name if rows == 0 else f"{name}[{rows}:]" for name, rows in named.items()]
    name, rows = next(iter(named.items()))
    what = f"{name} is" if rows == 0 else f"rows {rows} to {shapes[name][0] - 1} of {name} are"
    more = f" (and {len(named) - 1} more tensors)" if named.keys() - {name} else ""
    raise ValueError(
        f"{what} not in the checkpoint that the model was loaded from{more}: these values were made anew, so a ticket "
        f"that leaves them out would not give the trained model back. Pass dense={patterns} to train them whole and "
        "store them in the ticket, or load a base that has them"
    )


def _covers(dense: tuple[int, int] | None, rows: int, shape: tuple[int, ...]) -> bool:
    return dense is not None and dense[0] <= rows and dense[1] == whole(shape)[1]


def _look(model: torch.nn.Module) -> dict[str, int]:
    folder = _checkpoint_of(model)
    if folder is None:
        return {}
    files = weight_files(folder)
    stored = _stored(files)
    filled = _filled(model, stored)
    aliases: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(param), []).append(name)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    new: dict[str, int] = {}
    shapes = weights.shapes(model)
    for name, param in model.named_parameters():
        there = [alias for alias in aliases[id(param)] if alias in filled]
        if not there:
            if not any(re.search(pattern, alias) for pattern in ignored for alias in aliases[id(param)]):
                new[name] = 0
            continue
        key = filled[there[0]]
        rows = None if key is None else _rows_there(shapes[name], *stored[key], key, param)
        if rows is not None:
            new[name] = rows
    # All of them new: these are other weights altogether, made from this configuration, and there is no base to lack.
    return {} if len(new) == len(shapes) else new


def _rows_there(
    shape: tuple[int, ...], file: Path, stored: tuple[int, ...], key: str, param: torch.nn.Parameter
) -> int | None:
    """How many leading rows of the parameter are the checkpoint's; None: all."""
    if len(shape) != len(stored) or shape[1:] != stored[1:]:
        # Another layout altogether: a conversion that kept the name, or a head of another width.
        return None if math.prod(shape) == math.prod(stored) else 0
    own = weights.own_part(param)
    sample = own.reshape(-1)[: min(_SAMPLE, math.prod(shape), math.prod(stored))]
    if sample.numel() and not _is_sample_of(sample, file, key, shape):
        return 0
    return stored[0] if shape and stored[0] < shape[0] else None


def _is_sample_of(sample: Tensor, file: Path, key: str, shape: tuple[int, ...]) -> bool:
    with safe_open(file, framework="pt") as source:
        if len(shape) == 0:
            return True
        size = max(1, math.prod(shape[1:]))
        there = source.get_slice(key)[: -(-sample.numel() // size)].reshape(-1)[: sample.numel()]
    if not there.is_floating_point():
        return True  # quantized: the loaded values are computed from these
    differ = there.to(sample.dtype) != sample.to(there.device)
    return bool(differ.float().mean() < 0.5)


def _checkpoint_of(model: torch.nn.Module) -> Path | None:
    """The folder of safetensors files that the model was loaded from; None where it is not known or not at hand."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name or getattr(config, "quantization_config", None) is not None:
        return None
    folder = Path(name) if Path(name).is_dir() else _cached(name, getattr(config, "_commit_hash", None))
    if folder is None:
        return None
    try:
        weight_files(folder)
    except ValueError:
        return None
    return folder


def _cached(name: str, revision: str | None) -> Path | None:
    """Where the hub's cache has the model; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if name.count("/") > 1:
        return None
    for file in ("model.safetensors.index.json", "model.safetensors"):
        path = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _stored(files: Iterable[Path]) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor of a checkpoint."""
    found = {}
    for file in files:
        if not file.is_file():
            continue
        with safe_open(file, framework="pt") as source:
            for key in source.keys():  # noqa: SIM118 (a safe_open is not iterable)
                found[key] = file, tuple(source.get_slice(key).get_shape())
    return found


def _filled(model: Any, keys: Iterable[str]) -> dict[str, str | None]:
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


def model_facts(model: Any) -> dict[str, Any]:
    """What a folder with base and ticket needs in its config.json to load as this model: its class, and the entries
    that a new head or more rows change, with the base's own values where its config.json is at hand."""
    config = getattr(model, "config", None)
    if config is None:
        return {"class": type(model).__name__, "config": {}, "base_config": None}
    now = _with_text(json.loads(config.to_json_string(use_diff=False)))
    now["architectures"] = [type(model).__name__]
    folder = _checkpoint_of(model)
    base: dict[str, Any] | None = None
    if folder is not None and (folder / "config.json").is_file():
        base = _with_text(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    entries = [*_ENTRIES, *(key for key in base or {} if key not in _ENTRIES and key not in _OF_THE_RUN)]
    taken = {key: now[key] for key in entries if key in now and (base is None or base.get(key) != now[key])}
    return {
        "class": type(model).__name__,
        "config": taken,
        "base_config": None if base is None else {key: base[key] for key in taken if key in base},
    }


def _with_text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config") or {}
    return config | {key: text[key] for key in _TEXT_ENTRIES if key in text}

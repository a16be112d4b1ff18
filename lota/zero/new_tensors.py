"""Tensors of a model that its base does not have: a new head, a projector, the rows that a resized embedding gained.

transformers fills what a checkpoint does not hold with random numbers and only logs it. A ticket for such a model would
describe another one: whoever loads the base again gets other random numbers.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from lota.architecture import TEXT_ENTRIES
from lota.checkpoint_keys import filled_names
from lota.delivery.model_folder import weight_files
from lota.ranks.agree import together
from lota.ticket.rows import Rows, whole
from lota.zero.deepspeed import weights

_SAMPLE = 1024
"""Entries of a tensor that are compared with the checkpoint's: numbers made anew differ in nearly all of them."""

_LOG = logging.getLogger("lota")

_ENTRIES = ("architectures", "id2label", "label2id", "problem_type", *TEXT_ENTRIES)
"""What of config.json goes with tensors that a base does not have. Multimodal models keep some in `text_config`."""
_OF_THE_RUN = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "text_config")
"""What differs between a base's config.json and a loaded model's, and says nothing about its tensors."""


def new_tensors(model: torch.nn.Module) -> dict[str, int]:
    """By name, how many leading rows the base's checkpoint has of each parameter of which it does not have all.

    The base is what the model, or the transformers model inside it, was loaded from (`config._name_or_path`), if that
    is a folder or in the hub's cache. A model without one has no new tensors that could be found; rank 0 warns where it
    names a base that cannot be read. Rank 0 looks, at the headers of the files and a thousand entries of every tensor.
    Collective over the world.
    """
    found: dict[str, int] = {}
    with together():
        if dist.get_rank() == 0:
            found = _look(model)
    box: list[Any] = [found]
    dist.broadcast_object_list(box, src=0)
    return dict(box[0])


def mark_as_bases(model: torch.nn.Module, names: Collection[str]) -> None:
    """Note of these parameters that they were proved to be the base's, by their fingerprints: `new_tensors` believes it
    whatever is assigned to them afterwards."""
    for name, param in model.named_parameters():
        if name in names:
            setattr(param, _MARK, True)


_MARK = "lota_is_the_bases"


def refuse_new(new: Mapping[str, int], model: torch.nn.Module, trains_whole: Callable[[str, Rows], bool]) -> None:
    """ValueError for a new tensor that is not trained whole, with the cure. trains_whole(name, rows): whether all
    entries of these rows are trained and stored."""
    shapes = weights.shapes(model)
    named = {name: rows for name, rows in new.items() if not trains_whole(name, (rows, whole(shapes[name])[1]))}
    if not named:
        return
    patterns = [name if rows == 0 else f"{name}[{rows}:]" for name, rows in named.items()]
    name, rows = next(iter(named.items()))
    what = f"{name} is" if rows == 0 else f"rows {rows} to {shapes[name][0] - 1} of {name} are"
    more = f" (and {len(named) - 1} more tensors)" if named.keys() - {name} else ""
    frozen = [other for other, param in model.named_parameters() if other in named and not param.requires_grad]
    thaw = f"Set requires_grad to True on {', '.join(frozen)}, which is frozen, and pass" if frozen else "Pass"
    raise ValueError(
        f"{what} not in the checkpoint that the model was loaded from{more}: these values were made anew, so a ticket "
        f"that leaves them out would not give the trained model back. {thaw} dense={patterns} to train them whole and "
        "store them in the ticket, or load a base that has them"
    )


@dataclass(frozen=True)
class _Compared:
    """A tensor beside its checkpoint. rows: how many leading rows are the checkpoint's; None: all. is_evidence: the
    values agree, and are no constant that any new model would have too."""

    rows: int | None
    is_evidence: bool = False


def _look(model: torch.nn.Module) -> dict[str, int]:
    """`new_tensors` on one rank: of the model, or of the transformers models inside it and what surrounds them."""
    found: dict[str, int] = {}
    inside: set[int] = set()
    is_known = False
    for prefix, part in _parts(model):
        part_new = _look_at(part, prefix)
        if part_new is not None:
            is_known = True
            found |= part_new
        inside |= {id(param) for param in part.parameters()}
    if not is_known:
        return {}
    around = {name: 0 for name, param in model.named_parameters() if id(param) not in inside}
    order = weights.shapes(model)
    return {name: (found | around)[name] for name in order if name in found or name in around}


def _parts(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The outermost modules that know where they were loaded from, with the prefix of their names."""
    if getattr(getattr(model, "config", None), "_name_or_path", None):
        return [("", model)]
    return [(f"{name}.{prefix}", part) for name, child in model.named_children() for prefix, part in _parts(child)]


def _look_at(model: torch.nn.Module, prefix: str) -> dict[str, int] | None:
    """The new tensors of one model, under `prefix`; None where it has no checkpoint at hand to be compared with."""
    folder, reason = _checkpoint_of(model)
    if folder is None:
        _LOG.warning(
            "the model was not compared with its base, because %s: tensors or rows that the base lacks must be named "
            "in dense, or the ticket will not give the trained model back",
            reason,
        )
        return None
    stored = _stored(weight_files(folder))
    filled = filled_names(model, stored)
    aliases: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(param), []).append(name)
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    new: dict[str, int] = {}
    is_evident = False
    shapes = weights.shapes(model)
    for name, param in model.named_parameters():
        there = [alias for alias in aliases[id(param)] if alias in filled]
        if not there:
            if not any(re.search(pattern, alias) for pattern in ignored for alias in aliases[id(param)]):
                new[prefix + name] = 0
            continue
        if getattr(param, _MARK, False):
            is_evident = True
            continue
        key = filled[there[0]]
        if key is None:
            is_evident = True  # computed from keys of the checkpoint: its name says so
            continue
        compared = _compare(shapes[name], *stored[key], key, param)
        is_evident |= compared.is_evidence
        if compared.rows is not None:
            new[prefix + name] = compared.rows
    if is_evident or not shapes:
        return new
    # These are other weights altogether, made from this configuration: there is no base to lack.
    _LOG.warning(
        "no weights of the model are those of %s, which its configuration names, so it is taken for a new model: a "
        "ticket for it is good only for these very weights",
        folder,
    )
    return None


def _compare(
    shape: tuple[int, ...], file: Path, stored: tuple[int, ...], key: str, param: torch.nn.Parameter
) -> _Compared:
    if len(shape) != len(stored) or shape[1:] != stored[1:]:
        # Another layout altogether: a conversion that kept the name, or a head of another width.
        return _Compared(None if math.prod(shape) == math.prod(stored) else 0)
    own = weights.own_part(param)
    sample = own.reshape(-1)[: min(_SAMPLE, math.prod(shape), math.prod(stored))]
    if sample.numel() and not _is_sample_of(sample, file, key, shape):
        return _Compared(0)
    is_constant = sample.numel() == 0 or bool((sample == sample[0]).all())
    return _Compared(stored[0] if shape and stored[0] < shape[0] else None, is_evidence=not is_constant)


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


def _checkpoint_of(model: torch.nn.Module) -> tuple[Path | None, str]:
    """The folder of safetensors files that the model was loaded from; where there is none at hand, None and why."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "_name_or_path", "") or "")
    if not name:
        return None, "its configuration names none"
    if getattr(config, "quantization_config", None) is not None:
        return None, "its weights are quantized"
    folder = Path(name) if Path(name).is_dir() else _cached(name, getattr(config, "_commit_hash", None))
    if folder is None:
        return None, f"{name} is neither a folder nor in the hub's cache"
    try:
        weight_files(folder)
    except ValueError as error:
        return None, str(error)
    return folder, ""


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


def class_name(model: Any) -> str:
    """The name of the class that is trained."""
    return type(model).__name__


def model_facts(model: Any) -> dict[str, Any]:
    """What a folder with base and ticket needs in its config.json to load as this model: its class, and the entries
    that a new head or more rows change, with the base's own values where its config.json is at hand."""
    config = getattr(model, "config", None)
    if config is None:
        return {"class": type(model).__name__, "config": {}, "base_config": None}
    now = _with_text(json.loads(config.to_json_string(use_diff=False)))
    now["architectures"] = [type(model).__name__]
    folder, _ = _checkpoint_of(model)
    base: dict[str, Any] | None = None
    if folder is not None and (folder / "config.json").is_file():
        base = _with_text(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    parts = getattr(config, "sub_configs", None) or {}  # towers have neither heads nor rows of the vocabulary
    known = {*_ENTRIES, *_OF_THE_RUN, *parts}
    entries = [*_ENTRIES, *(key for key in base or {} if key not in known)]
    taken = {key: now[key] for key in entries if key in now and (base is None or base.get(key) != now[key])}
    return {
        "class": type(model).__name__,
        "config": taken,
        "base_config": None if base is None else {key: base[key] for key in taken if key in base},
    }


def _with_text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config") or {}
    return config | {key: text[key] for key in TEXT_ENTRIES if key in text}

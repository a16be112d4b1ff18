"""Which transformers class and configuration a model has, and that model without weights: names, shapes, modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lota.files import read_json
from lota.tensor_names import find_names

TEXT_ENTRIES = ("vocab_size", "pad_token_id")
"""Entries of config.json that multimodal models keep in `text_config`."""


def build_on_meta(
    folder: Path,
    model_facts: Mapping[str, Any] | None = None,
    *,
    names: Collection[str] = (),
    as_causal: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """The model of a folder's config.json, as transformers would load it, on the meta device (no memory, no weights).

    The class is the one that the configuration names, else a causal language model. names: tensors that it must have;
    of a multimodal base, a causal language model is its text part, and has other names than the whole. model_facts:
    what a ticket says of the model that was trained: its class, which comes first, and, of one with more tensors than
    its base, entries of config.json (see `lota.ticket.Manifest`). as_causal: what the recipes train and score, a causal
    language model, where the configuration has one. ValueError without config.json.
    """
    facts = model_facts or {}
    config = read_config(folder, trust_remote_code=trust_remote_code)
    set_entries(config, facts.get("config") or {})
    first: nn.Module | None = None
    for made in _classes(config, str(facts.get("class") or ""), as_causal):
        try:
            with torch.device("meta"), without_zero3():
                model: nn.Module = made(config, trust_remote_code)
        except Exception as error:  # noqa: BLE001 (whatever transformers makes of odd values)
            reason = f"{folder}: transformers makes no model of its config.json: {error}"
            continue
        first = first or model
        known = model.state_dict(keep_vars=True)
        prefix = getattr(model, "base_model_prefix", None)
        if None not in find_names(names, known, prefix).values():
            return model
    if first is None:
        raise ValueError(reason)
    return first


def read_config(model: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A transformers configuration; code that a folder brings along is not run unless asked for. ValueError where there
    is none, or nothing that transformers knows."""
    import transformers

    if isinstance(model, Path) and not (model / "config.json").is_file():
        raise ValueError(f"{model} holds no config.json: expected the folder of a transformers model")
    if Path(model).is_dir():
        _check_sizes(read_json(Path(model) / "config.json"), f"{Path(model) / 'config.json'}")
    try:
        return transformers.AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001 (whatever transformers makes of odd values in the file)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs code that its folder brings along: read it, and allow it (trust_remote_code: true, or "
            reason += "--trust-remote-code for lota plan, apply, revert and export)"
    raise ValueError(f"{model}: no config.json that transformers understands: {reason}")


_COUNTS = re.compile(r"layer|depth|block|expert|stage|num_labels|n_head|num_.*heads|codebook|group", re.IGNORECASE)
_SIZES = re.compile(r"size|dim|vocab|scale|factor|coef", re.IGNORECASE)
_MOST, _MOST_COUNTED = 1 << 40, 100_000
"""Larger sizes in a config.json are a mistake, and would have transformers build for hours: of anything, and of what is
built one by one."""


def _check_sizes(content: Any, where: str) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and "theta" not in key
            most = _MOST_COUNTED if _COUNTS.search(key) and not _SIZES.search(key) else _MOST
            if is_number and not abs(value) <= most:
                raise ValueError(f"{where}: expected a size that a model can have, got {key}: {value:.6g}")
            _check_sizes(value, where)
    elif isinstance(content, list):
        for value in content[:_MOST_COUNTED]:
            _check_sizes(value, where)


def check_is_name(model: str) -> None:
    """ValueError where `model` is neither a folder that exists nor can be a name on the hub."""
    path = Path(model)
    if path.is_dir():
        return
    if path.exists():
        raise ValueError(f"{model}: expected a model's folder or a name on the hub, got a file")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or not model.strip() or model.endswith("/"):
        raise ValueError(f"{model}: no such folder (and no name on the hub, which is like owner/model)")


def check_is_model(folder: Path) -> None:
    """ValueError for a folder that holds something else, which is named."""
    if (folder / "config.json").is_file():
        return
    if (folder / "ticket.json").is_file():
        raise ValueError(f"{folder} is a ticket (or a mask), no model: give its base, and the ticket where tickets go")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is a PEFT adapter, no model: merge it into its base first, and give that folder")
    if (folder / "config.yaml").is_file() or (folder / "summary.json").is_file():
        inside = " Its merged/ is a model." if (folder / "merged").is_dir() else ""
        raise ValueError(f"{folder} is the folder of a run, no model.{inside} Its ticket/ goes onto the base")
    raise ValueError(f"{folder} holds no config.json: expected the folder of a transformers model")


def _classes(config: Any, trained: str, as_causal: bool) -> Iterator[Any]:
    """Ways to make a model of `config`, the likeliest first: functions of it and of whether its code may run."""
    import transformers

    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if as_causal and type(config) in causal:
        yield lambda config, _: transformers.AutoModelForCausalLM.from_config(config)
    names = dict.fromkeys([trained, *map(str, config.architectures or [])])
    for name in names:
        named = getattr(transformers, name, None) if name else None
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            yield lambda config, _, named=named: named._from_config(fitting_config(config, named))
    yield lambda config, trusted: transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
    yield lambda config, trusted: transformers.AutoModel.from_config(config, trust_remote_code=trusted)


def fitting_config(config: Any, made: Any) -> Any:
    """The part of a multimodal configuration that a class of its text part takes."""
    wanted = getattr(made, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, key, None) for key in getattr(config, "sub_configs", None) or {})
    return next((part for part in parts if isinstance(part, wanted)), config)


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

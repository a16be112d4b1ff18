"""Where a recipe's DeepSpeed configuration comes from, and what can be said about it before anything runs."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

from lota.packaged import DS_CONFIGS, find, names

DEFAULT = "zero3"


def accelerate_has_one() -> bool:
    """Whether `accelerate launch` started this process with a DeepSpeed configuration of its own.

    ACCELERATE_USE_DEEPSPEED alone does not say so: every accelerator under DeepSpeed sets it, so that it stands there
    from the first phase of a run on.
    """
    return "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ or "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ


def choose(given: dict[str, Any] | str | None) -> dict[str, Any] | str | None:
    """What TrainingArguments gets for `deepspeed`: None, where accelerate's configuration takes the default's place.

    A bare word names a packaged file (zero3). A file that is not there or not JSON raises ValueError with its name and
    line. Where both accelerate and the options name one, accelerate raises.
    """
    if given == DEFAULT and accelerate_has_one():
        return None
    if isinstance(given, str) and not given.lstrip().startswith("{"):
        given = str(_path(given))
        _read(given)
    return given


def content(config: Any) -> dict[str, Any]:
    """The configuration itself: from a file, from the options, or accelerate's."""
    if isinstance(config.deepspeed, dict):
        return config.deepspeed
    if config.deepspeed:
        is_json = config.deepspeed.lstrip().startswith("{")
        return json.loads(config.deepspeed) if is_json else _read(_path(config.deepspeed))
    plugin = getattr(config, "deepspeed_plugin", None)
    if plugin is None:
        raise ValueError("deepspeed must name a ZeRO-3 JSON file, or be zero3, the one that comes with lota")
    return plugin.deepspeed_config


def check(config: Any, is_sparse: bool) -> None:
    """ValueError for another stage, and for offloading that could not be set aside for the sparse phase.

    What the blocks refuse besides, they name themselves when an engine is built.
    """
    zero = content(config).get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        raise ValueError(
            f"zero_optimization.stage must be 3, got {zero.get('stage', 0)}. To keep all weights on every rank, as the "
            "other stages do, set stage 3 and shard_group_size: 1"
        )
    if is_sparse and not config.deepspeed and _offloads_optimizer(zero):
        raise ValueError(
            "accelerate's configuration offloads the optimizer, whose state has the size of the mask in sparse "
            "training and stays with the weights: set offload_optimizer_device to none there, or leave accelerate's "
            "DeepSpeed section out and give the recipe a file with --deepspeed, of which it is set aside"
        )


def for_sparse_training(config: Any) -> tuple[dict[str, Any], list[str]]:
    """Changes of TrainingArguments for the sparse phase, and notes that say them.

    Offloading the optimizer to the CPU is meant for dense states, in calibration; the sparse ones are as small as the
    mask and stay with the weights.
    """
    raw = content(config)
    if not config.deepspeed or not _offloads_optimizer(raw.get("zero_optimization", {})):
        return {}, []
    raw = copy.deepcopy(raw)
    del raw["zero_optimization"]["offload_optimizer"]
    note = "offload_optimizer is set aside for the sparse phase: its states have the size of the mask"
    return {"deepspeed": raw}, [note]


def _offloads_optimizer(zero: dict[str, Any]) -> bool:
    return (zero.get("offload_optimizer") or {}).get("device", "none") == "cpu"


def _path(given: str) -> Path:
    return find(DS_CONFIGS, given, ".json") or Path(given)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"deepspeed: {path} cannot be read ({error.strerror}); give a DeepSpeed JSON file, or the name of one that "
            f"comes with lota: {', '.join(names(DS_CONFIGS, '.json'))}"
        ) from error
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"deepspeed: {path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}). JSON knows no "
            "comments and no comma after a last entry."
        ) from error
    if not isinstance(raw, dict):
        raise ValueError(f"deepspeed: {path} must hold a JSON object, got {type(raw).__name__}")
    return raw

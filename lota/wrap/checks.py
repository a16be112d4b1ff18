"""What was asked is checked before the command starts: a rank would say the same, minutes later."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lota import choices
from lota.retention import load_all
from lota.ticket.reader import read_manifest


def calibration_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `lota.calibration_zero3`. ValueError where one is wrong or a ticket is not there."""
    choices.check_choice("score", given["score"], choices.SCORES)
    choices.check_density(given["density"])
    choices.check_budget(given["budget"])
    choices.check_max_skipped_steps(given["max_skipped_steps"])
    protect = [_place(path) for path in given["protect"] or ()]
    for path in protect:
        read_manifest(path)
    names = ("score", "density", "budget", "include", "exclude", "dense", "seed", "max_skipped_steps")
    return {name: given[name] for name in names} | {"protect": protect}


def training_options(given: Mapping[str, Any], mask: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `lota.sparse_zero3` and of its `save_ticket`. mask: None where it is still to be made."""
    choices.check_reductions(given["gradient_reduction"], given["reduce_every"])
    choices.check_choice("kernels", given["kernels"], choices.KERNELS)
    choices.check_max_skipped_steps(given["max_skipped_steps"])
    choices.check_rounding_seed(given["rounding_seed"])
    choices.check_choice("ticket_form", given["ticket_form"], choices.TICKET_FORMS)
    if given["ticket_dtype"] is not None:
        choices.check_choice("ticket_dtype", given["ticket_dtype"], ("float32",))
    retain = [_place(path) for path in given["retain"] or ()]
    pull = choices.PULL if retain and given["pull"] is None else given["pull"]
    choices.check_pull(pull, retain)
    load_all(retain)
    if mask is not None:
        read_manifest(mask)
    names = ("dense", "gradient_reduction", "reduce_every", "kernels", "max_skipped_steps", "rounding_seed")
    options = {name: given[name] for name in names} | {
        "mask": None if mask is None else _place(mask),
        "retain": retain,
        "shard_group_size": _group_size(given["shard_group_size"]),
        "pull": pull,
        "num_steps": None if pull is None else given["num_steps"],
    }
    return options, {"dtype": given["ticket_dtype"], "form": given["ticket_form"]}


def check_num_steps(num_steps: int | None) -> int | None:
    """ValueError for anything but None or a positive integer."""
    if num_steps is not None and num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}: how many steps the command makes")
    return num_steps


def _place(path: str) -> str:
    """The absolute path of what is there, because the command may change its folder; else a name on the hub."""
    return os.path.abspath(path) if Path(path).exists() else path


def _group_size(text: str | None) -> int | str | None:
    if text is None or text in ("node", "world"):
        return text
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise ValueError(f"shard_group_size must be a number of ranks, node or world, got {text!r}")

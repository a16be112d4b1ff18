"""What a phase would refuse hours later, refused now: its optimizer and schedule are built once, on two numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from lota.run import ds_config
from lota.run.options import Config
from lota.run.resolve import RunOptions
from lota.train.tracking import tracking_of
from lota.zero.compact.update import choose_update

_STEPS = 10


def rehearse(options: RunOptions, config: Config) -> None:
    """ValueError for an optimizer, a schedule or a tracker that a later phase could not use. Every rank, before
    anything is loaded."""
    settings = ds_config.content(config)
    optimizer = None if "optimizer" in settings else _optimizer(config)
    if optimizer is not None and options.is_sparse:
        choose_update(optimizer, torch.device("cpu"), options.rounding_seed)
    if "scheduler" not in settings:
        _try_schedule(config, optimizer)
    try:
        tracking_of(Path(str(config.output_dir)), config.report_to)
    except (RuntimeError, ImportError, ValueError) as error:
        raise ValueError(f"report_to: {error} (or report_to: none)") from None


def _optimizer(config: Config) -> torch.optim.Optimizer:
    """The one that the Trainer makes of `optim` and its arguments."""
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.float32))
    try:
        kind, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
        made: torch.optim.Optimizer = kind([parameter], **_on_cpu(arguments))
    except Exception as error:  # noqa: BLE001 (whatever the optimizer makes of its arguments)
        name = getattr(config.optim, "value", config.optim)
        raise ValueError(f"optim: {name} cannot be used with these settings: {error}") from None
    return made


def _on_cpu(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without the implementation for one device, which the two numbers are not on."""
    return {key: value for key, value in arguments.items() if key not in ("fused", "foreach", "capturable")}


def _try_schedule(config: Config, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2, dtype=torch.float32))], lr=config.learning_rate)
    try:
        get_scheduler(
            config.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=config.get_warmup_steps(_STEPS),
            num_training_steps=_STEPS,
            scheduler_specific_kwargs=config.lr_scheduler_kwargs,
        )
    except Exception as error:  # noqa: BLE001 (whatever the schedule makes of its arguments)
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type: {name} cannot be used with lr_scheduler_kwargs {config.lr_scheduler_kwargs}: {error}"
        ) from None

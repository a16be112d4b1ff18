"""Whether a resumed run is the run that was begun: its options, rows a step, DeepSpeed settings and data files.

config.yaml holds the options; run.json what they do not say: how many ranks there were, and what was in the files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.data import sources
from lota.data.options import DataPlan
from lota.run import ds_config
from lota.run.batch import Batch

# What a run may be resumed with another value of: nothing that trained weights depend on. The batch is compared by its
# rows a step, and DeepSpeed's settings are compared themselves.
MAY_CHANGE = frozenset(
    {
        *("resume_from_checkpoint", "output_dir", "save_strategy", "save_steps", "save_total_limit", "merged"),
        *("run_name", "logging_steps", "logging_strategy", "logging_first_step", "report_to"),
        *("dataloader_num_workers", "kernels", "shard_group_size", "gradient_reduction", "per_device_eval_batch_size"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "deepspeed"),
        *("max_skipped_steps", "server", "server_check_steps", "server_tolerance"),
    }
)
# Of DeepSpeed's settings: how weights are sharded, moved and offloaded, and what is printed. Rows a step have a check
# of their own.
_DEEPSPEED_MAY_CHANGE = (
    *("zero_optimization", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler"),
    *("tensorboard", "wandb", "comet", "csv_monitor", "activation_checkpointing", "aio"),
)
_STOCK = ("full", "lora")


def facts(plan: DataPlan, config: Any, ranks: int) -> dict[str, Any]:
    """What run.json holds. config: TRL's, as resolved."""
    settings = copy.deepcopy(ds_config.content(config))
    for name in _DEEPSPEED_MAY_CHANGE:
        settings.pop(name, None)
    return {
        "batch": asdict(Batch.of(config, ranks)),
        "deepspeed": settings,
        "data": {str(path): sources.file_identity(path) for path in sources.named_files(plan)},
    }


_PATHS = (
    *("model_name_or_path", "train_file", "eval_file", "mask", "protect", "tickets", "retain", "kept"),
    *("chat_template_path", "tasks_path"),
)


def _resolved(options: Mapping[str, Any]) -> dict[str, Any]:
    """With paths that exist as they really are: the same file may be named through links, or from elsewhere."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {key: resolve(item) if key in _PATHS else item for key, item in value.items()}
        return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value

    found = {name: resolve(value) if name in _PATHS else value for name, value in options.items()}
    if isinstance(found.get("mixture"), list):
        found["mixture"] = [resolve(entry) for entry in found["mixture"]]
    return found


def check_options(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """ValueError, naming every option that differs and may not."""
    before, now = _resolved(before), _resolved(now)
    names = sorted({*before, *now} - MAY_CHANGE)
    differing = [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    ]
    if differing:
        raise ValueError(
            f"output_dir {folder} holds a run with different options ({'; '.join(differing)}). A run resumes with "
            "the options it began with: give those, or another output_dir"
        )


def check_facts(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """ValueError where a step would have another number of rows, or DeepSpeed's settings or the data are others."""
    was, here = Batch(**before["batch"]), Batch(**now["batch"])
    if was.rows != here.rows:
        raise ValueError(
            f"output_dir {folder} holds a run of {was}; this would be {here}. A run keeps its rows a step: "
            f"{here.cure(was.rows)}"
        )
    old, new = before["deepspeed"], now["deepspeed"]
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"output_dir {folder} holds a run with different DeepSpeed settings ({name} was {old.get(name)!r}, now "
                f"{new.get(name)!r}). Of these only zero_optimization, sizes of batches and what is printed may change"
            )
    for name in sorted({*before["data"], *now["data"]}):
        if before["data"].get(name) != now["data"].get(name):
            raise ValueError(
                f"the run in output_dir {folder} was begun on different data: {name} {_changed(before, now, name)}. "
                "Put the file back, or begin a new run in another output_dir"
            )


def check_ranks(before: Batch, now: Batch, method: str, config: Any) -> None:
    """ValueError where a checkpoint that was made with `before` cannot be resumed on a different number of ranks."""
    if before.ranks == now.ranks:
        return
    if method in _STOCK:
        raise ValueError(
            f"method: {method} trains with stock DeepSpeed, whose checkpoints load only on the number of ranks that "
            f"wrote them: {before.ranks}, and here are {now.ranks}. Resume with {before.ranks} ranks, or begin in "
            "another output_dir"
        )
    if config.train_sampling_strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy: {config.train_sampling_strategy} orders rows by micro batches and ranks, so on "
            f"{now.ranks} ranks rows would be seen twice or never: resume with {before.ranks} ranks"
        )
    accelerator = config.accelerator_config
    differing = [name for name, usual in _ACCELERATOR.items() if getattr(accelerator, name, usual) is not usual]
    if differing:
        raise ValueError(
            f"accelerator_config.{differing[0]} deals rows out by ranks, so on {now.ranks} ranks different rows would "
            f"be seen: resume with {before.ranks} ranks"
        )


_ACCELERATOR = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], name: str) -> str:
    old, new = before["data"].get(name), now["data"].get(name)
    if old is None or new is None:
        return "was not a file of it" if old is None else "is not there any more"
    if old["bytes"] != new["bytes"]:
        return f"had {old['bytes']} bytes, now {new['bytes']}"
    return "has other contents of the same length"

"""What a run leaves behind: resolved config, metrics, summary. Rank zero writes, to a temporary name, then renames."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate
import deepspeed
import torch
import torch.distributed as dist
import transformers
import trl
import yaml

from lota.card import write_ticket_card
from recipes.arguments import Config, LotaArguments

LEFT_BY_A_RUN = ("config.yaml", "metrics.jsonl", "summary.json", "report.png", "ticket", "mask", "adapter", "merged")


class RunFolder:
    """The folder `output_dir` of one run. All ranks build it, together; only rank 0 writes."""

    def __init__(self, path: str | Path) -> None:
        """Refuse a folder that already holds a run. Collective: no rank looks after another has begun to write."""
        self.path = Path(path)
        self.is_writer = rank() == 0
        found = [name for name in LEFT_BY_A_RUN if (self.path / name).exists()]
        if found:
            raise ValueError(
                f"output_dir {self.path} already holds a run ({', '.join(found)}): choose another, or remove it first"
            )
        barrier()
        if self.is_writer:
            self.path.mkdir(parents=True, exist_ok=True)

    def write_config(self, args: LotaArguments, config: Config) -> None:
        """The options as resolved, to be used again with --config."""
        defaults = type(config).__dataclass_fields__
        options = {name: value for name, value in asdict(args).items() if value is not None}
        for name, entry in defaults.items():
            value = getattr(config, name, None)
            value = getattr(value, "value", value)
            if name in _ALWAYS_WRITTEN or (entry.init and _is_plain(value) and value != entry.default):
                options[name] = value
        for name in _FILLED_IN:
            options.pop(name, None)
        if self.is_writer:
            _write(self.path / "config.yaml", yaml.safe_dump(options, sort_keys=False, allow_unicode=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """summary.json, the last thing a run writes: where it is, the run is complete."""
        if self.is_writer:
            _write(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")

    def write_card(self, facts: dict[str, Any]) -> None:
        """The model card of ticket/; facts: rows beside what the ticket itself tells."""
        if self.is_writer:
            write_ticket_card(self.path / "ticket", facts)

    def draw_report(self, summary: dict[str, Any]) -> None:
        """report.png. Whatever goes wrong with a picture, the run is not lost for it."""
        if self.is_writer:
            try:
                from recipes.report import draw_report

                draw_report(self.path, summary)
            except Exception as error:  # noqa: BLE001 (said, and the run goes on)
                say(f"report.png was not drawn ({error!r}); try again: python recipes/report.py {self.path}")

    def add_metrics(self, row: dict[str, Any]) -> None:
        """One line of metrics.jsonl."""
        if self.is_writer:
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


_ALWAYS_WRITTEN = ("learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "seed", "max_length")
# Filled in by TrainingArguments from the machine or from other options; they resolve again when the file is used.
_FILLED_IN = (
    *("use_cpu", "local_rank", "disable_tqdm", "dataloader_pin_memory", "pad_to_multiple_of"),
    *("activation_checkpointing", "report_to", "include_for_metrics", "debug"),
)


def versions() -> dict[str, str]:
    """What ran."""
    modules = (torch, deepspeed, transformers, trl, accelerate)
    return {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules}


def rank() -> int:
    """This process's rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(f"[lota] {text}", flush=True)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))

"""The options of a sequence beside those of its runs, declared without torch, for `--help` and docs/options.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SequenceArguments:
    """What a sequence has beside the options of `lota train`, which hold for every task unless the task has its own."""

    tasks: list[Any] | None = field(
        default=None,
        metadata={"help": "List of tasks in their order: each a name and any options of lota train. In the file only."},
    )
    disjoint: bool = field(
        default=True,
        metadata={"help": "Entries of earlier tasks cannot be chosen again (LoTTO). A task may have its own."},
    )
    retain_earlier: bool = field(
        default=True,
        metadata={"help": "Where a task has a pull, it is to what all earlier tasks need. A task may have its own."},
    )
    eval_rows_limit: int = field(
        default=256, metadata={"help": "After every task at most so many evaluation rows of each task are scored."}
    )
    keep_models: bool = field(
        default=False, metadata={"help": "Keep the whole model of every task with method full or lora."}
    )


OF_A_TASK = ("disjoint", "retain_earlier")
"""Those that a task may have of its own."""

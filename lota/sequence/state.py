"""What is known of a sequence: its tasks, and what every task scored after every stage. The file sequence.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lota.files import naming_odd, read_json_object, write_text

STATE_NAME = "sequence.json"
FORMAT_VERSION = 1
REMOVED = "removed"
Scores = dict[str, float]
"""Figures of one task on one model: loss, exact_tokens, exact_tokens_stderr, num_rows, num_answer_tokens."""


@dataclass
class TaskState:
    """A task whose training has begun. folder: its run folder, below that of the sequence. options: those it was asked
    for, resolved. num_shared: entries that it shares with earlier tasks, known once it is complete."""

    name: str
    folder: str
    options: dict[str, Any]
    disjoint: bool
    retain_earlier: bool
    is_complete: bool = False
    is_removed: bool = False
    num_shared: int = 0


@dataclass
class Stage:
    """A model that the sequence had: the base, or what a training or a removal left. after: `base`, the name of the
    task that was trained, or `without NAME`. trained: that task's name, "" for the others. tasks: whose training is in
    the model, in order. scores: by task."""

    after: str
    trained: str
    tasks: tuple[str, ...]
    scores: dict[str, Scores] = field(default_factory=dict)


@dataclass
class State:
    """settings: what all figures depend on, which may not change. rows: identity of every task's evaluation rows."""

    method: str
    settings: dict[str, Any]
    rows: dict[str, str] = field(default_factory=dict)
    tasks: list[TaskState] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)

    @property
    def on_model(self) -> list[TaskState]:
        """The tasks that are complete and were not removed, in the order of their training."""
        return [task for task in self.tasks if task.is_complete and not task.is_removed]

    def task(self, name: str) -> TaskState | None:
        """The task of that name, once it has begun."""
        return next((task for task in self.tasks if task.name == name), None)

    def next_folder(self, name: str) -> str:
        """The run folder of a task that begins now: numbers are never given twice."""
        numbers = [int(task.folder.split("-")[0]) for task in self.tasks]
        return f"{max(numbers, default=0) + 1:02d}-{name}"

    def removed_folder(self, task: TaskState) -> str:
        """Where the run of a removed task is put aside."""
        return f"{REMOVED}/{task.folder}"

    def place_of(self, task: TaskState) -> str:
        """Where the run of a task is now."""
        return self.removed_folder(task) if task.is_removed else task.folder

    def write(self, folder: Path) -> None:
        """sequence.json, by one rename."""
        content = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_text(folder / STATE_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def is_sequence(folder: Path) -> bool:
    """Whether a folder is that of a sequence."""
    return (folder / STATE_NAME).is_file()


def read_state(folder: Path) -> State:
    """The state of the sequence in a folder. ValueError where there is none, or none that this version reads."""
    path = folder / STATE_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of a sequence: it has no {STATE_NAME}")
    with naming_odd(str(path)):
        content = read_json_object(path)
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format version {FORMAT_VERSION}, got {version!r}: use a newer lota")
        tasks = [_checked(TaskState(**task)) for task in content.pop("tasks")]
        stages = [
            Stage(str(stage["after"]), str(stage["trained"]), tuple(stage["tasks"]), _scores(stage["scores"]))
            for stage in content.pop("stages")
        ]
        return State(**content, tasks=tasks, stages=stages)


_FOLDER = re.compile(r"\d\d+-[A-Za-z0-9._-]+")


def _checked(task: TaskState) -> TaskState:
    if not _FOLDER.fullmatch(task.folder):
        raise TypeError(f"{task.folder!r:.80} is no folder of a task")
    return task


def _scores(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Scores]:
    return {str(task): {str(name): _number(value) for name, value in scores.items()} for task, scores in found.items()}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.80} is no figure")
    return value

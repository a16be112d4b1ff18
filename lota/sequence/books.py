"""What the folder of a sequence holds beside the run folders of its tasks. One process writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lota.files import write_text
from lota.progress import Say, silent
from lota.sequence.config import CONFIG_NAME
from lota.sequence.ledger import Ledger, make_ledger
from lota.sequence.matrix import METRICS, Matrix, write_tables
from lota.sequence.state import STATE_NAME, State, is_sequence, read_state
from lota.ticket import Ticket

SUMMARY_NAME = "summary.json"


def open_state(folder: Path) -> State | None:
    """The state of the sequence in a folder; None where there is nothing yet. ValueError for a folder with something
    else. What a killed removal left undone is done."""
    if is_sequence(folder):
        state = read_state(folder)
        put_aside(state, folder)
        # A run that was begun and whose folder somebody removed was given up.
        state.tasks = [task for task in state.tasks if task.is_complete or (folder / task.folder).is_dir()]
        return state
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    if found or folder.is_file():
        raise ValueError(
            f"output_dir {folder} holds something that is no sequence ({', '.join(found[:3])}): choose another, or "
            "remove it first"
        )
    return None


def put_aside(state: State, folder: Path) -> None:
    """Move the run folders of removed tasks to where they belong."""
    for task in state.tasks:
        if task.is_removed and (folder / task.folder).is_dir():
            (folder / state.removed_folder(task)).parent.mkdir(exist_ok=True)
            shutil.move(folder / task.folder, folder / state.removed_folder(task))


def ticket_paths(state: State, folder: Path) -> dict[str, Path]:
    """The tickets in the model, by task, in order."""
    return {task.name: folder / task.folder / "ticket" for task in state.on_model}


def ledger_of(state: State, folder: Path, say: Say = silent) -> Ledger:
    """The ledger of the tickets in the model."""
    paths = ticket_paths(state, folder)
    return make_ledger(list(paths), [Ticket.load(path) for path in paths.values()], say)


def kept(state: State) -> dict[str, dict[str, dict[str, float | None]]]:
    """Of every task in the model, by metric, what the base scored, what it scored after its own stage, and what now."""
    matrix = Matrix.of(state)
    last = len(matrix.stages) - 1

    def moments(task: str, metric: str) -> dict[str, float | None]:
        own = matrix.own(task)
        after = None if own is None else matrix.value(own, task, metric)
        return {"base": matrix.value(0, task, metric), "own": after, "now": matrix.value(last, task, metric)}

    return {task.name: {metric: moments(task.name, metric) for metric in METRICS} for task in state.on_model}


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """config.yaml, which `lota sequence FOLDER` reads."""
    write_text(folder / CONFIG_NAME, yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True))


def forget_task(folder: Path, name: str) -> None:
    """Take a task out of config.yaml."""
    content = yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    content["tasks"] = [task for task in content["tasks"] if task.get("name") != name]
    write_config(folder, content)


def write_matrix(state: State, folder: Path) -> None:
    """matrix.csv, summary.csv and matrix.png."""
    if not any(stage.scores for stage in state.stages):
        return
    from lota.sequence.picture import draw_matrices

    matrix = Matrix.of(state)
    write_tables(matrix, folder)
    draw_matrices([("", matrix)], folder / "matrix.png")


def write_ledger(state: State, ledger: Ledger, folder: Path) -> None:
    """ledger.json and ledger.png."""
    content = ledger.content()
    scores = kept(state)
    for task in content["tasks"]:
        task["ticket"] = str(Path(_place(state, task["name"])) / "ticket")
        task["kept"] = scores[task["name"]]
    write_text(folder / "ledger.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    if ledger.tensors:
        from lota.sequence.picture import draw_ledger

        draw_ledger(ledger, folder / "ledger.png")


def _place(state: State, name: str) -> str:
    task = state.task(name)
    assert task is not None
    return task.folder


def write_summary(state: State, folder: Path, facts: Mapping[str, Any]) -> None:
    """summary.json, with which a sequence is complete."""
    matrix = Matrix.of(state)
    content = {
        "method": state.method,
        **state.settings,
        "tasks": [
            {"name": task.name, "folder": task.folder, **_facts(folder / task.folder)} for task in state.on_model
        ],
        "removed": [task.name for task in state.tasks if task.is_removed],
        "figures": {metric: matrix.figures(metric) for metric in METRICS},
        "kept": kept(state),
        **facts,
    }
    write_text(folder / SUMMARY_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _facts(run: Path) -> dict[str, Any]:
    """Of a run's summary what a sequence tells of it."""
    try:
        summary = json.loads((run / SUMMARY_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    facts = {"seconds": summary.get("seconds", {}).get("total"), "steps": summary.get("training", {}).get("steps")}
    mask = summary.get("mask") or {}
    return facts | {name: mask[name] for name in ("num_active", "density") if name in mask}


def begin_again(folder: Path) -> None:
    """What said that the sequence is complete is taken away."""
    (folder / SUMMARY_NAME).unlink(missing_ok=True)


__all__ = [
    "STATE_NAME", "begin_again", "forget_task", "kept", "ledger_of", "open_state", "put_aside", "ticket_paths",
    "write_config", "write_ledger", "write_matrix", "write_summary",
]  # fmt: skip

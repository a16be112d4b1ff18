"""Checkpoints of a recipe's phase: whole folders by one rename, the newest complete one to go on from, and rotation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lota.run import checkpoint_manifest
from lota.run.batch import Batch

STATE_NAME = "trainer_state.json"
FOLDER = re.compile(r"checkpoint-(\d+)")






def adopt(state: Any, args: Any) -> None:
    """Make the state that a checkpoint brought this run's own: its intervals are those asked for now, and the best
    checkpoint lies in this `output_dir`, which may have been moved. Without this the Trainer would forget the best."""
    state.compute_steps(args, state.max_steps)
    best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or None."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := FOLDER.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Whether the last file of a checkpoint is there; in the recipes all appear together."""
    return (path / checkpoint_manifest.NAME).is_file()


def step_of(path: Path) -> int:
    """The step after which `checkpoint-N` was made."""
    match = FOLDER.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def wants_resume(value: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks to go on: true, or a path."""
    return str(value).lower() not in ("none", "false", "")


def chosen(value: str | bool | None, folder: Path) -> Path | None:
    """The checkpoint in `folder` to go on from: the newest complete one, or the one that was asked for by path."""
    if not wants_resume(value):
        return None
    if str(value).lower() == "true":
        return newest(folder)
    path = Path(str(value))
    return path if path.absolute().parent == folder.absolute() else None


def check_request(value: str | bool | None, run_folder: Path) -> Batch | None:
    """The batch that the checkpoint to go on from was made with; None where there is none, so that a phase begins.

    ValueError where it is damaged, or was asked for by path and is not a complete one of this run.
    """
    if not wants_resume(value):
        return None
    calibration = run_folder / "calibration"
    if str(value).lower() == "true":
        path = newest(run_folder) or newest(calibration)
        if path is None:
            return None
    else:
        path = Path(str(value))
        if path.absolute().parent not in (run_folder.absolute(), calibration.absolute()):
            raise ValueError(
                f"resume_from_checkpoint must be true or a checkpoint of this run, got {path}, which does not lie in "
                f"output_dir {run_folder}: give the output_dir of the run that it belongs to"
            )
        if not is_complete(path):
            raise ValueError(f"{path} is not a complete checkpoint; {_last_sound(path)}")
    try:
        return checkpoint_manifest.verify(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_last_sound(path)}") from None


def _last_sound(path: Path) -> str:
    """What can be gone on from instead of `path`."""
    others = [other for other in path.parent.glob("checkpoint-*") if FOLDER.fullmatch(other.name) and other != path]
    for other in sorted(others, key=step_of, reverse=True):
        try:
            checkpoint_manifest.verify(other)
        except ValueError:
            continue
        return f"the newest complete one is {other}: give --resume_from_checkpoint {other}"
    return "there is none in its folder that is complete"

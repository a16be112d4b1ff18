"""The checkpoint folders of a run: `checkpoint-N`, N the step after which it was made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lota.run import checkpoint_manifest

STATE_NAME = "trainer_state.json"
FOLDER = re.compile(r"checkpoint-(\d+)")


def take_over_state(state: Any, args: Any) -> None:
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

"""Checkpoints of a recipe's phase: whole folders by one rename, the newest complete one to go on from, and rotation."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import set_seed
from transformers.trainer_utils import rotate_checkpoints

from lota.folder import naming_disk_full, sync
from lota.zero.agreement import together
from recipes import contents
from recipes.batch import Batch, whole_steps

STATE_NAME = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


class WholeCheckpoints:
    """Put before a Trainer class: `checkpoint-N` appears by one rename, after all ranks have written their part.

    The Trainer itself writes into the folder piece by piece under its final name, so a killed save looks complete.
    Older checkpoints are removed only after the new one is there.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's would stand in output_dir and speak of a model that is not there; the ticket has a card of its own."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer looks after a step whether it was the last: going on from the last checkpoint, it would take one
        more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Every step of an epoch has all its rows, and the same ones on any number of ranks."""
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        rows = Batch.of(self.args, self.args.world_size).rows
        return whole_steps(sampler, rows, self.args.dataloader_drop_last)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states of a checkpoint of as many ranks; new ones, from the seed, on another number."""
        if checkpoint is None:
            return
        if contents.read(Path(checkpoint))[0].ranks == self.args.world_size:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
        else:
            set_seed(new_seed(self.args.seed, self.state.global_step, self.args.process_index))

    def _remove_later(self, folder: Path) -> None:
        """Remove checkpoints of a run that had come further, before this one went on from an older checkpoint: they
        would be the ones to go on from, and rotation would keep them."""
        for path in folder.glob("checkpoint-*"):
            if _FOLDER.fullmatch(path.name) and step_of(path) > self.state.global_step:
                shutil.rmtree(path, ignore_errors=True)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))  # type: ignore[misc]
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / f".{name}.partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit, self._staging = self.args.save_total_limit, None, staging
        try:
            with naming_disk_full(folder / name):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit, self._staging = limit, None
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / STATE_NAME))
        self.accelerator.wait_for_everyone()
        views: list[contents.Files | None] = [None] * dist.get_world_size()
        with together():
            view = contents.look(staging / name) if self.args.local_process_index == 0 else None
        dist.all_gather_object(views, view)
        with together(), naming_disk_full(folder / name):
            if self.args.should_save:
                contents.write(staging / name, Batch.of(self.args, self.args.world_size), views)
                shutil.rmtree(folder / name, ignore_errors=True)  # left by a run that went on from an older checkpoint
                sync(staging / name)
                os.replace(staging / name, folder / name)
                sync(folder)
                staging.rmdir()
                self._remove_later(folder)
                rotate_checkpoints(str(folder), limit, self.state.best_model_checkpoint, use_mtime=False)


def new_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a rank that goes on from a checkpoint of another number of ranks; 32 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:4], "little")


def adopt(state: Any, args: Any) -> None:
    """Make the state that a checkpoint brought this run's own: its intervals are those asked for now, and the best
    checkpoint lies in this `output_dir`, which may have been moved. Without this the Trainer would forget the best."""
    state.compute_steps(args, state.max_steps)
    best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
    if state.best_global_step and best.is_dir():
        state.best_model_checkpoint = str(best)


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step in `folder`, or None."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _FOLDER.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if is_complete(path)), None)


def is_complete(path: Path) -> bool:
    """Whether the last file of a checkpoint is there; in the recipes all appear together."""
    return (path / contents.NAME).is_file()


def step_of(path: Path) -> int:
    """The step after which `checkpoint-N` was made."""
    match = _FOLDER.fullmatch(path.name)
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
        return contents.verify(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_last_sound(path)}") from None


def _last_sound(path: Path) -> str:
    """What can be gone on from instead of `path`."""
    others = [other for other in path.parent.glob("checkpoint-*") if _FOLDER.fullmatch(other.name) and other != path]
    for other in sorted(others, key=step_of, reverse=True):
        try:
            contents.verify(other)
        except ValueError:
            continue
        return f"the newest complete one is {other}: give --resume_from_checkpoint {other}"
    return "there is none in its folder that is complete"

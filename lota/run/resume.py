"""From which checkpoint a run resumes: decided once, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lota.run import checkpoint_manifest
from lota.run.batch import Batch
from lota.run.checkpoints import FOLDER, is_complete, newest, step_of


@dataclass(frozen=True)
class Resume:
    """checkpoint: the folder to resume from, of calibration or training; None where a phase begins. batch: the rows of
    a step that it was made with."""

    checkpoint: Path | None = None
    batch: Batch | None = None

    @classmethod
    def decide(cls, request: str | bool | None, run_folder: Path) -> Resume:
        """request: the option `resume_from_checkpoint`: true takes the newest complete checkpoint, of training if there
        is one, and a path that one. Reads the files of the checkpoint.

        ValueError where it is damaged, or was asked for by path and is not a complete one of this run.
        """
        if not wants_resume(request):
            return cls()
        calibration = run_folder / "calibration"
        if str(request).lower() == "true":
            path = newest(run_folder) or newest(calibration)
            if path is None:
                return cls()
        else:
            path = Path(str(request))
            if path.absolute().parent not in (run_folder.absolute(), calibration.absolute()):
                raise ValueError(
                    f"resume_from_checkpoint must be true or a checkpoint of this run, got {path}, which does not lie "
                    f"in output_dir {run_folder}: give the output_dir of the run that it belongs to"
                )
            if not is_complete(path):
                raise ValueError(f"{path} is not a complete checkpoint; {_last_sound(path)}")
        try:
            return cls(path, checkpoint_manifest.verify(path))
        except ValueError as error:
            raise ValueError(f"{error}; {_last_sound(path)}") from None

    def of_phase(self, folder: Path) -> Path | None:
        """The checkpoint, if it is one of the phase whose checkpoints lie in `folder`."""
        is_there = self.checkpoint is not None and self.checkpoint.absolute().parent == folder.absolute()
        return self.checkpoint if is_there else None


def wants_resume(value: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` asks for it: true, or a path."""
    return str(value).lower() not in ("none", "false", "")


def _last_sound(path: Path) -> str:
    """What to resume from instead of `path`."""
    others = [other for other in path.parent.glob("checkpoint-*") if FOLDER.fullmatch(other.name) and other != path]
    for other in sorted(others, key=step_of, reverse=True):
        try:
            checkpoint_manifest.verify(other)
        except ValueError:
            continue
        return f"the newest complete one is {other}: give --resume_from_checkpoint {other}"
    return "there is none in its folder that is complete"

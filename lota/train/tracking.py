"""TensorBoard, Weights & Biases and their like see both phases as one run: calibration first, then training."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks


def tracking_of(folder: Path, report_to: Any) -> Tracking:
    """The integrations of the run in `folder`: made for its first phase, and the same ones for the next."""
    return _made(folder, tuple(report_to or ()))


class Tracking:
    """The integrations that `report_to` names, made once for all phases of a run that lives in `folder`."""

    def __init__(self, report_to: Any, folder: Path) -> None:
        self._integrations = [make() for make in get_reporting_integration_callbacks(report_to)]
        for integration in self._integrations:
            # One folder whenever the run resumes; the Trainer's name for it holds the time of the start.
            if getattr(integration, "logging_dir", "") is None:
                integration.logging_dir = str(folder / "tensorboard")

    def callbacks(self, phase: str, first_step: int) -> list[TrainerCallback]:
        """For the trainer of one phase, whose first step is the run's `first_step`."""
        return [_OfPhase(self._integrations, phase, first_step)] if self._integrations else []


@cache
def _made(folder: Path, report_to: tuple[str, ...]) -> Tracking:
    return Tracking(list(report_to), folder)


class _OfPhase(TrainerCallback):
    """Hands events on, steps counted through, and names what calibration logs `calibration_...`."""

    def __init__(self, integrations: list[TrainerCallback], phase: str, first_step: int) -> None:
        self._integrations, self._first_step = integrations, first_step
        self._prefix = "" if phase == "train" else "calibration_"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for integration in self._integrations:
            integration.on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        shifted = copy.copy(state)
        shifted.global_step += self._first_step
        renamed = {self._prefix + key: value for key, value in (logs or {}).items()}
        for integration in self._integrations:
            integration.on_log(args, shifted, control, logs=renamed, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for integration in self._integrations:
            integration.on_save(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._prefix:  # the run continues after calibration
            for integration in self._integrations:
                integration.on_train_end(args, state, control, **kwargs)

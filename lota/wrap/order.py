"""What the launcher tells the ranks of a command: one environment variable, which travels to other hosts too."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

VARIABLE = "PYTHON_LOTA_RUN"
"""`deepspeed --hostfile` passes variables whose names begin with PYTHON on to other hosts, unquoted: hence base64."""
PHASE_VARIABLE = "LOTA_PHASE"
"""For the command itself, in every process of it."""
CALIBRATION, TRAINING = "calibration", "training"
RESULT = "result"
"""In the folder of a run: the mask or the ticket, until the command has ended well."""


@dataclass(frozen=True)
class Order:
    """One phase of a command.

    folder: of this run alone, absolute; ranks leave their reports and the result there. options: of the block. save: of
    `save_ticket`. num_steps: how many steps the command must make, where that is known. command: its words.
    """

    phase: str
    folder: str
    options: Mapping[str, Any]
    save: Mapping[str, Any]
    num_steps: int | None
    command: tuple[str, ...]

    @property
    def outcome(self) -> str:
        """What the phase ends with, for messages."""
        return "mask" if self.phase == CALIBRATION else "ticket"

    def encode(self) -> str:
        """Text of letters, digits, `-`, `_` and `=`."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def from_environment(cls) -> Order:
        """What this process was told."""
        told = json.loads(base64.urlsafe_b64decode(os.environ[VARIABLE]))
        return cls(**told | {"command": tuple(told["command"])})

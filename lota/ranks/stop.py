"""A signal that asks a run to stop: it finishes its step, saves a checkpoint, and exits with status 75 (try again).

SLURM sends SIGTERM when it wants the nodes back, and on request another signal some time before (`--signal=USR1@120`);
a preempted cloud machine gets SIGTERM. It is enough that one rank receives it: all stop after the same step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from lota.ranks.output import outlive_readers
from lota.ranks.world import print_once

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_heard = 0


class Preempted(SystemExit):
    """Ends the process with EXIT_STATUS. Not an Exception: nobody may take it for a failure, or recover from it."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


@contextmanager
def listening() -> Iterator[None]:
    """Within the block SIGUSR1 and SIGTERM are noted, however often they come, and end nothing. For the main thread.

    After a stop they are ignored: srun and launchers that see the first rank end send SIGTERM to the others, whose
    status that would change.
    """
    global _heard
    _heard = 0
    after: list[Any] = [signal.signal(number, _note) for number in SIGNALS]
    try:
        yield
    except Preempted:
        after = [signal.SIG_IGN] * len(SIGNALS)
        raise
    finally:
        for number, handler in zip(SIGNALS, after):
            signal.signal(number, handler)


def _forget_in_child() -> None:
    """Workers that a library forks, and ends by SIGTERM, end by it."""
    if signal.getsignal(signal.SIGTERM) is _note:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def _note(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = number
    outlive_readers()


def signal_received() -> int:
    """The number of a signal that came to any rank, the same on every rank; 0 where none came. Collective: 4 bytes."""
    if not dist.is_initialized():
        return _heard
    highest = torch.tensor(_heard, dtype=torch.int32, device=get_accelerator().current_device_name())
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return int(highest)


def leave_if_asked(when: str) -> None:
    """Between two phases, where everything worth keeping is on the disk: end the run if any rank was asked to stop.
    Collective."""
    number = signal_received()
    if number:
        leave(number, when)


def leave(number: int, when: str) -> None:
    print_once(
        f"stopped by {signal.Signals(number).name} {when}; exit status {EXIT_STATUS}. "
        "The same command with --resume_from_checkpoint true resumes from here"
    )
    raise Preempted

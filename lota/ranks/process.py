"""How a recipe runs as a job of several ranks: when one rank dies all exit promptly, and the log says why."""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable

import torch.distributed as dist

from lota.ranks.quiet import quiet_libraries
from lota.ranks.watch import RankWatch

RESUME = " Resume with the same command and --resume_from_checkpoint true."
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
CAUSE_TIMEOUT = 5.0  # seconds to wait after a broken collective to learn which rank caused it

_advice: str | None = None
_watch: RankWatch | None = None
_is_training = False
_has_begun = False
_GIVEN_WRONG = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)


def run_job(main: Callable[[], None], advice: str = "") -> None:
    """Run `main` as this process's job and exit: 0, 2 where the user gave something wrong, 1 for everything else.

    advice: what to do after a rank ended too early; begins with a space.
    """
    global _advice
    _advice = advice
    quiet_libraries()
    print_anything()
    try:
        main()
    except Exception as error:  # noqa: BLE001 (reported to all ranks)
        sys.exit(_end(error))
    except SystemExit:
        _leave()
        raise
    _leave()


def watch_ranks() -> None:
    """From now on every rank notices when another one exits, in a process that `run_job` runs. Collective; the ranks
    have met, which a launcher watches over."""
    global _watch
    if _advice is not None and _watch is None and dist.is_initialized():
        _watch = RankWatch(_advice)


def begun() -> None:
    """The run's folder holds what can be resumed: from now on the advice is given."""
    global _has_begun
    _has_begun = True


def print_anything() -> None:
    """A terminal of ASCII shows characters that it does not have as escapes, where printing them would be an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def training(is_training: bool) -> None:
    """Between the begin and the end of the steps nothing is checked that the user gave: a ValueError is a fault then,
    and shows where it came from."""
    global _is_training
    _is_training = is_training


def _leave() -> None:
    if _watch is not None:
        _watch.leave()


def _end(error: Exception) -> int:
    """Say what happened, once in a job; the exit status."""
    is_wrong_input = isinstance(error, (ValueError, *_GIVEN_WRONG)) and not _is_training
    is_disk_full = isinstance(error, OSError) and error.errno in _DISK_FULL
    says_all = is_wrong_input or is_disk_full or isinstance(error, FloatingPointError)  # from skipped steps
    reason = str(error) if is_wrong_input else f"{type(error).__name__}: {error}"
    if _watch is not None and isinstance(error, RuntimeError) and _watch.wait_for_end(CAUSE_TIMEOUT) is not None:
        return 1  # a collective that another rank broke
    if not says_all:
        traceback.print_exception(error)
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    text = reason if is_wrong_input else f"rank {rank} failed: {reason}.{_advice if _has_begun else ''}"
    if _watch is not None:
        _watch.fail(reason, text)
    else:
        if rank > 0:
            time.sleep(3)  # if all ranks fail the same way, rank 0 reports first, and its launcher ends the others
        print(f"[lota] {text}", file=sys.stderr, flush=True)
    return 2 if is_wrong_input else 1

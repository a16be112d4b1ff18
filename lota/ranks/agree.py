"""Ranks fail together and see the same: a rank that did not learn of an error would wait in the next collective.

    together            an error of any rank is raised on all: inside a block, where DeepSpeed joined the ranks
    checked_together    the same for checks of what the user gave: it also names the ranks and hosts that failed
    from_rank_0         what rank 0 sees holds for all
    check_same, check_output_dir    hosts have disks of their own: refuse where they differ
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

T = TypeVar("T")


@contextmanager
def together() -> Iterator[None]:
    """Run the block, which must not communicate, on every rank; an error of any rank is raised on all. Collective.

    A rank without an error of its own raises that of the lowest rank that has one. Anything but a ValueError, TypeError
    or OSError travels as a RuntimeError that quotes it.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 (raised on every rank)
        error = caught
    raise_together(error)


def raise_together(error: Exception | None) -> None:
    """Raise on every rank what any rank brings; returns where none brings anything. Collective."""
    shown: Any = None if error is None else (error if _can_travel(error) else RuntimeError(repr(error)))
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, shown)
    if error is not None:
        raise error
    for other in errors:
        if other is not None:
            raise other


def _can_travel(error: Exception) -> bool:
    return isinstance(error, (ValueError, TypeError, OSError)) and type(error).__module__ == "builtins"


# NFS may show for a minute what a folder held before (acdirmax).
PATIENCE_SECONDS = 70.0


@contextmanager
def checked_together() -> Iterator[None]:
    """Run the block, which must not communicate, on every rank; where one fails, all do. Collective.

    Unlike `together` it names the ranks that failed, with their hosts, where not all failed: a file
    missing on one host exists on the others, so rank 0's message must name the host.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 (raised on every rank)
        error = caught
    _join()
    failed = {place: text for place, text in _gathered(None if error is None else _text(error)) if text is not None}
    if not failed:
        return
    if error is not None and len(failed) == _num_ranks():
        raise error
    text = next(iter(failed.values())).rstrip(".")
    raise ValueError(
        f"{_shown(list(failed))} of {_num_ranks()} ranks: {text}. Every host needs the same files under the same paths"
    ) from error


def from_rank_0(look: Callable[[], T]) -> T:
    """What `look()`, which must not communicate, gives or raises on rank 0, on every rank. Collective.

    For what decides how a run continues: on a shared disk, too, a second host may see a file some seconds later.
    """
    if _num_ranks() == 1:
        return look()
    seen: list[Any] = [None, None, ValueError]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            seen[0] = look()
        except Exception as caught:  # noqa: BLE001 (raised on every rank)
            error, seen[1] = caught, _text(caught)
            seen[2] = OSError if isinstance(caught, OSError) else ValueError
    dist.broadcast_object_list(seen)
    if error is not None:
        raise error
    if seen[1] is not None:
        raise seen[2](seen[1])
    return seen[0]


def check_same(what: str, value: object) -> None:
    """ValueError on every rank where `value` is not the same on all of them. Collective."""
    found = _gathered(value)
    (first, expected), *_ = found
    other = next(((place, value) for place, value in found if value != expected), None)
    if other is not None:
        raise ValueError(
            f"{what} differ between ranks: {expected} on {first}, {other[1]} on {other[0]}. Every host needs the same "
            "files under the same paths"
        )


def check_output_dir(output_dir: str | os.PathLike[str]) -> None:
    """ValueError on every rank where `output_dir` is not one folder, made here, that all of them see. Collective."""
    folder = Path(output_dir)
    marker = folder / from_rank_0(lambda: _left_in(folder))
    try:
        found = _gathered(_appears(marker))
    finally:
        if _num_ranks() == 1 or dist.get_rank() == 0:
            marker.unlink(missing_ok=True)
    blind = [place for place, is_seen in found if not is_seen]
    if blind:
        raise ValueError(
            f"output_dir {folder.absolute()} is not one folder for all ranks: {_shown(blind)} of {len(found)} ranks "
            f"saw nothing of what {found[0][0]} wrote there. Checkpoints are written and read by all ranks: give an "
            "output_dir on a file system that all hosts share"
        )


def _left_in(folder: Path) -> str:
    """The name of a new file in `folder`."""
    name = f".seen-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError as error:
        raise ValueError(f"output_dir {folder.absolute()} cannot be written to: {error}") from error
    return name


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _join() -> None:
    """Join the other ranks, where TrainingArguments, which does so on accelerators, failed before it came to that."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed(verbose=False)


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered(value: Any) -> list[tuple[str, Any]]:
    """Every rank's value, and its name for messages, in rank order. Collective."""
    if _num_ranks() == 1:
        return [("rank 0", value)]
    found: list[Any] = [None] * _num_ranks()
    dist.all_gather_object(found, (f"rank {dist.get_rank()} ({socket.gethostname()})", value))
    return found


def _shown(places: list[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, (ValueError, OSError)) else repr(error)

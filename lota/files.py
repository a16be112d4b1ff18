"""Files and folders: read with bounds, written whole or not at all, one writer at a time; a full disk is named."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch and safetensors say of any failed write: a full disk, where little is free.
_FULL_SIGNS = ("inline_container.cc", "iostream error", "No space left on device", "Disk quota exceeded")


def write_text(path: Path, text: str) -> None:
    """Make `text` the content of a file, in UTF-8, by one rename: a reader finds the old content or the new, also after
    the machine went down."""
    temporary = path.with_name(f".{path.name}.partial")
    with naming_disk_full(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync_path(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def make_readable(folder: Path) -> None:
    """Let those who may read a folder read its files: safetensors makes files that only their owner may."""
    mode = folder.stat().st_mode & 0o666 | 0o200
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def sync(folder: Path) -> None:
    """Have what is in a folder, and its names, on the disk."""
    for path in folder.iterdir():
        if path.is_file():
            sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming_disk_full(path: Path) -> Iterator[None]:
    """What writers in the block make of a full disk becomes an OSError that names `path` and says how much is free.

    Python's own names no file, torch's is a RuntimeError that does not speak of the disk, safetensors' is of its own
    type.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number, file = (error.errno, error.filename) if isinstance(error, OSError) else (None, None)
        place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free / 2**20
        is_said = "MiB are free" in str(error)
        seems_full = free < 1024 and any(sign in str(error) for sign in _FULL_SIGNS)
        if is_said or (number not in _FULL and not seems_full):
            raise
        text = f"{os.strerror(number or errno.ENOSPC)}, {free:.1f} MiB are free: make room, then resume"
        raise OSError(number or errno.ENOSPC, text, file or str(path)) from error


MAX_JSON_BYTES = 1 << 28
"""More than any index or configuration has: what is larger, or no file at all (a pipe, a device), is not read."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. ValueError naming the file where it is none; OSError where it cannot be read."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MAX_JSON_BYTES:
                raise ValueError(f"more than {MAX_JSON_BYTES >> 20} MiB")
            return json.loads(file.read().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got lists or objects nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The same, where it must be an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def open_regular(path: Path) -> IO[bytes]:
    """A file, opened to be read in binary. ValueError where it is a pipe, a device, a socket or a folder: those could
    wait for ever, or never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a file, got something else (a folder, pipe or device)")
    return os.fdopen(descriptor, "rb")


_ODD = (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, AssertionError, RuntimeError)


@contextmanager
def naming_odd(what: str) -> Iterator[None]:
    """What code in the block makes of well-formed content of the wrong shape (a list where an object should be, a word
    where a number should be) becomes a ValueError that names `what`."""
    try:
        yield
    except _ODD as error:
        raise ValueError(f"{what}: not as it is written: {type(error).__name__} {error}"[:300]) from error


@contextmanager
def only_writer(path: Path, doing: str) -> Iterator[None]:
    """Hold `path` for the length of the block: ValueError where another process holds it, on this machine or another
    one that shares the folder. The system ends the hold with the process. doing: for the message, such as "writes".

    A hidden file beside `path` is locked, which names the holder; it is removed at the end. File systems without locks
    are not guarded.
    """
    file = path.with_name(f".{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{holder} {doing} {path} now: wait for it, or choose another folder") from None
        except OSError:
            break
        try:
            if os.stat(file).st_ino == os.fstat(descriptor).st_ino:
                break  # else the holder before us removed the file that we opened
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `path` that takes this name when the block ends well, and is removed when it does not.

    Its files are on the disk before it appears. What a killed process left behind is removed; one that is still writing
    to `path` is a ValueError, as is a `path` that is anything but absent or an empty folder.
    """
    path = Path(os.path.realpath(path))
    check_free(path)
    with only_writer(path, "writes"):
        pattern = re.compile(re.escape(f".{path.name}.partial-") + "[0-9a-f]{16}")
        for left in path.parent.iterdir():  # no process writes to `path` but this one
            if pattern.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)
        temporary = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
        temporary.mkdir()
        try:
            with naming_disk_full(path):
                yield temporary
                make_readable(temporary)
                for file in temporary.rglob("*"):
                    sync_path(file)
                sync_path(temporary)
            check_free(path)
            os.replace(temporary, path)
            sync_path(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_free(path: Path) -> None:
    """ValueError where `path` is anything but absent or an empty folder."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: choose another folder, or remove it first")

"""Files and folders that appear whole or not at all, and errors that name a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A hidden folder beside `path` that takes this name when the block ends well, and is removed when it does not.

    ValueError where `path` is anything but absent or an empty folder.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: choose another folder, or remove it first")
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with naming_disk_full(path):
            yield temporary
        readable = temporary.stat().st_mode & 0o666  # safetensors makes files that only their owner may read
        for file in temporary.iterdir():
            file.chmod(readable)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

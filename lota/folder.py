"""Files and checkpoint folders: found, read tensor by tensor, and written all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch and safetensors say of any failed write: a full disk, where little is free.
_FULL_SIGNS = ("inline_container.cc", "iostream error", "No space left on device", "Disk quota exceeded")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


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
        text = f"{os.strerror(number or errno.ENOSPC)}, {free:.1f} MiB are free: make room, then go on"
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


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or where the hub's copy is (downloaded, or found in the cache)."""
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ValueError(f"{model}: no such folder (and no name on the hub, which is like owner/model)")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"]))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load. Others (`consolidated.safetensors`, adapters) hold the same
    weights under other names, or other things. ValueError where there is none."""
    index = folder / INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / file for file in sorted(set(weight_map.values()))]
    files = [folder / "model.safetensors"]
    if not files[0].is_file():
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file; other formats are not read")
    return files


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor, one after another. ValueError where the file is missing or damaged."""
    with _opened(file) as source:
        for name in source.keys():  # noqa: SIM118 (a safe_open is not iterable)
            yield name, source.get_tensor(name)


def tensor_files(folder: Path) -> dict[str, Path]:
    """In which file every tensor of a checkpoint lies, by name."""
    homes: dict[str, Path] = {}
    for file in weight_files(folder):
        with _opened(file) as source:
            homes |= dict.fromkeys(source.keys(), file)
    return homes


def stored_dtypes(names: set[str], homes: dict[str, Path]) -> set[torch.dtype]:
    """The dtypes in which the tensors `names` lie in their files. ValueError where it is one that no ticket has."""
    found = set()
    for file in {homes[name] for name in names}:
        with _opened(file) as source:
            found |= {source.get_slice(name).get_dtype() for name in source.keys() if name in names}  # noqa: SIM118
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    other = found - known.keys()
    if other:
        raise ValueError(f"expected weights in bfloat16, float16 or float32, got {', '.join(sorted(other))}")
    return {known[code] for code in found}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as source:
            yield source
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file}: not a sound safetensors file: {error}. Copy it again.") from None

"""Folders of models: found, or downloaded from the hub, and read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


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


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file. ValueError where the file is missing or damaged."""
    with _opened(file) as source:
        return source.get_tensor(name)


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

"""Folders of models: found, or downloaded from the hub, and read tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lota.architecture import check_is_name
from lota.files import open_regular, read_json_object

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt", ".ot", ".onnx", ".npz", ".tflite",
    ".data", ".index",
)  # fmt: skip
_PATTERNS = [
    "*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*",
]  # fmt: skip
_NOT_NEEDED = ["consolidated*", "original/*", "onnx/*", "openvino/*", "coreml/*", "*.onnx"]


def locate(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or where the hub's copy is (downloaded, or found in the cache)."""
    check_is_name(model)
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=_PATTERNS, ignore_patterns=_NOT_NEEDED))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model}: there is no such folder, and the hub gives no such model: {reason}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load: one that config.json names, `model.safetensors`, those of the
    index. Where there is none of these, all that are called model*, else all; others (`consolidated.safetensors`,
    adapters) hold the same weights under other names, or other things. ValueError where there is none, and for an index
    that names anything but files of this folder.
    """
    named = _named_in_config(folder)
    if named is not None and not named.endswith(".index.json"):
        return [_inside(folder, named, "config.json")]
    if named is None and (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    index = folder / (named or INDEX_NAME)
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map with tensors, got {weight_map!s:.80}. Copy it again.")
        return [_inside(folder, file, index.name) for file in sorted(set(map(_checked_name, weight_map.values())))]
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
    files = [file for file in files if not file.name.startswith(("adapter_", "ticket", "consolidated"))]
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file of a model; other formats are not read")
    return files


def _named_in_config(folder: Path) -> str | None:
    """The file that a config.json asks for with `transformers_weights`."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    named = read_json_object(path).get("transformers_weights")
    return None if named is None else _checked_name(named)


def _checked_name(file: Any) -> str:
    if not isinstance(file, str) or file != Path(file).name or "\0" in file or not file:
        raise ValueError(f"expected the plain name of a file in the model's folder, got {file!r:.200}")
    return file


def _inside(folder: Path, file: str, named_by: str) -> Path:
    path = folder / file
    if not path.is_file():
        raise ValueError(f"{path}: {named_by} names this file, and it is not there (or is no file). Copy it again.")
    return path


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
    """In which file every tensor of a checkpoint lies, by name. ValueError where two files hold the same name."""
    homes: dict[str, Path] = {}
    for file in weight_files(folder):
        with _opened(file) as source:
            for name in source.keys():  # noqa: SIM118
                if name in homes:
                    raise ValueError(f"{folder}: {homes[name].name} and {file.name} both hold {name}: remove one")
                homes[name] = file
    return homes


def stored_dtypes(names: Collection[str], homes: Mapping[str, Path]) -> set[torch.dtype]:
    """The dtypes in which the tensors `names` lie in their files. ValueError where it is one that no ticket has."""
    found = set()
    for file in {homes[name] for name in names}:
        with _opened(file) as source:
            found |= {source.get_slice(name).get_dtype() for name in source.keys() if name in names}  # noqa: SIM118
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    other = found - known.keys()
    if other:
        raise ValueError(f"expected weights in bfloat16, float16 or float32, got {', '.join(sorted(other))}")
    return {known[code] for code in found}


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        open_regular(file).close()
        with safe_open(file, framework="pt") as source:
            yield source
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file}: not a sound safetensors file: {error}. Copy it again.") from None

"""What a model's folder holds beside its weights: copied along with a model that is written anew."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from lota.delivery.model_folder import WEIGHT_SUFFIXES
from lota.files import open_regular, read_json

_OF_A_RUN = {
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "latest", "zero_to_fp32.py",
    "summary.json", "log.jsonl",
}  # fmt: skip
_OF_ADAPTERS = ("adapter_",)
_OF_TICKETS = ("ticket.json",)


def copy_side_files(source: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Copy into `folder` what belongs to the model `source` and is no weight: configuration, tokenizer, processors,
    chat templates (also in subfolders), licences. Contents only: modes and times are not the base's.

    Left out: weights of any format and their indices, adapters, hidden files, what a Trainer leaves, subfolders that
    hold weights (the same ones in other formats; those that a modules.json names come along), and links that lead out
    of the folder (out of the hub's cache, for a folder there), which `say` names.
    """
    allowed = _allowed(source)
    for path in _wanted(source):
        relative = path.relative_to(source)
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(root) for root in allowed):
            say(f"{relative} is left out: it is a link to {real}, outside of the model's folder")
            continue
        if not real.is_file():
            continue
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        with open_regular(real) as content, open(target, "wb") as file:
            shutil.copyfileobj(content, file)


def _allowed(source: Path) -> list[Path]:
    """Where links may lead: into the folder, and for a snapshot in the hub's cache into that repository's cache."""
    roots = [source.resolve(), Path(os.path.abspath(source))]
    for root in list(roots):
        if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
            roots.append(root.parent.parent)
    return roots


def _wanted(source: Path) -> Iterator[Path]:
    modules = _module_folders(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if path.is_symlink():
                continue
            inside = [other for other in sorted(path.rglob("*")) if other.is_file() and not other.name.startswith(".")]
            if path.name in modules or not any(_is_weights(other) for other in inside):
                yield from inside
        elif path.is_file() and not _is_left_out(path):
            yield path


def _is_left_out(path: Path) -> bool:
    name = path.name
    return (
        _is_weights(path)
        or name in _OF_A_RUN
        or name.startswith((*_OF_ADAPTERS, "rng_state"))
        or name in _OF_TICKETS
        or name.endswith(".index.json")
    )


def _is_weights(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES


def _module_folders(source: Path) -> set[str]:
    """The folders that sentence-transformers' modules.json names: further modules, some with weights of their own."""
    path = source / "modules.json"
    if not path.is_file():
        return set()
    content = read_json(path)
    entries = content if isinstance(content, list) else []
    return {str(entry.get("path")) for entry in entries if isinstance(entry, dict) and entry.get("path")}

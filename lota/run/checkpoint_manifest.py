"""contents.json of a checkpoint folder: all its files with their lengths, and the ranks and rows a step that made it.

It is written last, so a folder without one was not finished. What it says is checked before a run resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lota.files import naming_odd, read_json, write_text
from lota.run.batch import Batch

NAME = "contents.json"
FORMAT, VERSION = "lota-recipe-checkpoint", 1
# Larger files hold the engine's state, which has sha256 of its own for every vector.
LARGEST_HASHED = 1 << 20

Files = dict[str, dict[str, Any]]
"""{path inside the folder: {"bytes": length, "sha256": of small files}}."""


def list_files(folder: Path) -> Files:
    """The files in `folder` as this machine sees them."""
    found: Files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME):
        found[path.relative_to(folder).as_posix()] = _facts(path)
    return found


def write(folder: Path, batch: Batch, views: Iterable[Mapping[str, Mapping[str, Any]] | None]) -> None:
    """Write contents.json. views: what ranks of each machine saw, the writer's first; a shared disk may show a file of
    another machine late, so a file is taken as it was seen longest."""
    files: dict[str, Mapping[str, Any]] = {}
    for view in views:
        for name, facts in (view or {}).items():
            if name not in files or facts["bytes"] > files[name]["bytes"]:
                files[name] = facts
    body = {"format": FORMAT, "version": VERSION, "batch": asdict(batch), "files": files}
    text = json.dumps({**body, "sha256": _digest(body)}, indent=1)
    write_text(folder / NAME, text)


def read(folder: Path) -> tuple[Batch, Files]:
    """What contents.json says. ValueError where it is missing, damaged or newer."""
    try:
        body = read_json(folder / NAME)
    except FileNotFoundError:
        raise ValueError(f"checkpoint {folder} has no {NAME}, so it was not finished") from None
    except ValueError as error:
        reason = str(error).removeprefix(f"{folder / NAME}: ")
        raise ValueError(f"checkpoint {folder} is damaged: {NAME}: {reason}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError(f"checkpoint {folder} is damaged: {NAME} does not say format {FORMAT!r}")
    if body.get("version") != VERSION:
        raise ValueError(f"checkpoint {folder}: expected version {VERSION} of {NAME}, got {body.get('version')!r:.80}")
    if body.pop("sha256", None) != _digest(body):
        raise ValueError(f"checkpoint {folder} is damaged: {NAME} does not match its own sha256")
    with naming_odd(f"checkpoint {folder} is damaged: {NAME}"):
        batch = Batch(**body["batch"])
        if any(type(value) is not int or value < 1 for value in asdict(batch).values()):
            raise TypeError(f"expected numbers of rows and ranks, got {body['batch']!r:.80}")
        for name, facts in body["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts or type(facts["bytes"]) is not int:
                raise TypeError(f"{name!r:.80} is no file of a checkpoint")
        return batch, body["files"]


def verify(folder: Path) -> Batch:
    """The batch that `folder` was made with; ValueError where a file of it is not there, or not as it was written."""
    batch, files = read(folder)
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"checkpoint {folder} is damaged: {name:.200} is not there")
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(
                f"checkpoint {folder} is damaged: {name:.200} has {path.stat().st_size} bytes, "
                f"{expected['bytes']} were written"
            )
        if "sha256" in expected and _facts(path) != expected:
            raise ValueError(f"checkpoint {folder} is damaged: {name:.200} does not have the sha256 that was written")
    return batch


def _facts(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > LARGEST_HASHED:
        return {"bytes": size}
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""Checkpoint folders: every rank's share of every vector in safetensors, the rest in JSON; complete, or not there.

    global_step20/
      checkpoint.json                    what it is of, counters, and length and sha256 of every vector in every file
      state-00001-of-00002.safetensors   what the first rank of the shard group owned, and so on

A vector (the masters of a tensor's active entries, say) is cut over the files in rank order, so that any number of
ranks can read its own part. Writing goes to a hidden name first and ends with one rename. Nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.files import naming_disk_full, naming_odd, read_json
from lota.ranks.agree import together
from lota.ticket.container import DTYPE_CODES, StoredTensor, StreamWriter, read_bytes, read_header

MANIFEST_NAME = "checkpoint.json"
FORMAT, VERSION = "lota-checkpoint", 2
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Vector:
    """This rank's entries `start : start + length` of a vector that the ranks of a shard group hold together.

    get: the entries, 1-D, of `dtype`. put: takes them back, in the same dtype.
    """

    key: str
    start: int
    length: int
    get: Callable[[], Tensor]
    put: Callable[[Tensor], Any]
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, key: str, start: int, view: Tensor) -> Vector:
        """Entries that lie in `view`."""
        return cls(key, start, view.numel(), lambda: view, lambda values: view.copy_(values), view.dtype)


def write(
    path: Path, vectors: Sequence[Vector], facts: Mapping[str, Any], *, file_number: int | None, num_files: int
) -> None:
    """Write the folder `path`, replacing an older one of that name. Collective over the world.

    file_number: which of the `num_files` files this rank writes, None for replicas. facts: JSON, rank 0's count.
    Whatever goes wrong on any rank is raised on all, and leaves nothing behind.
    """
    temporary = path.with_name(f".{path.name}.partial")
    is_first = dist.get_rank() == 0
    try:
        with together(), naming_disk_full(path):
            if is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        record: dict[str, Any] | None = None
        with together(), naming_disk_full(path):
            if file_number is not None:
                name = f"state-{file_number + 1:05d}-of-{num_files:05d}.safetensors"
                record = {"name": name, "vectors": _write_vectors(temporary / name, vectors)}
        records: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(records, record)
        with together(), naming_disk_full(path):
            if is_first:
                files = sorted((entry for entry in records if entry is not None), key=lambda entry: entry["name"])
                _write_manifest(temporary / MANIFEST_NAME, {**facts, "files": files})
                _publish(temporary, path)
    finally:
        if is_first:
            shutil.rmtree(temporary, ignore_errors=True)


class Stored:
    """A checkpoint folder. ValueError, naming the folder, where checkpoint.json is missing, damaged or newer."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            facts = read_json(path / MANIFEST_NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{path}: expected a checkpoint of lota with {MANIFEST_NAME}, got none. It was not finished, or made "
                "outside a lota block: resume from another one."
            ) from None
        except ValueError as error:
            raise self._damaged(str(error)) from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise self._damaged(f"{MANIFEST_NAME} does not say format {FORMAT!r}")
        if facts.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected version {VERSION} of the format, got {facts.get('version')!r:.80}: resume with the "
                "version of lota that wrote it"
            )
        if facts.pop("sha256", None) != _digest(facts):
            raise self._damaged(f"{MANIFEST_NAME} does not match its own sha256")
        with naming_odd(f"checkpoint {path} is damaged: {MANIFEST_NAME}"):
            _check_facts(facts)
        self.facts: dict[str, Any] = facts
        self._headers: dict[str, dict[str, StoredTensor]] = {}

    def verify(self, part: int, num_parts: int) -> None:
        """Read every `num_parts`-th piece from `part` on; ValueError where a file is cut, damaged or not there."""
        pieces = [(file["name"], key, *row) for file in self.facts["files"] for key, row in file["vectors"].items()]
        for piece in pieces[part::num_parts]:
            self._read_piece(*piece)

    def keys(self) -> set[str]:
        """Names of all vectors."""
        return {key for file in self.facts["files"] for key in file["vectors"]}

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Entries `start:stop` of a vector, held against their sha256. ValueError where they are not there."""
        pieces, first = [], 0
        for file in self.facts["files"]:
            length, sha256 = file["vectors"].get(key, (0, ""))
            low, high = max(start - first, 0), min(stop - first, length)
            if low < high:
                pieces.append(self._read_piece(file["name"], key, length, sha256)[low:high])
            first += length
        if sum(piece.numel() for piece in pieces) != stop - start:
            raise self._damaged(f"{key} has {first} entries, {stop} were expected")
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.float32)

    def _read_piece(self, file: str, key: str, length: int, sha256: str) -> Tensor:
        try:
            if file not in self._headers:
                self._headers[file] = read_header(self.path / file)
            stored = self._headers[file].get(key)
            if stored is None or stored.num_bytes != length * _DTYPES[stored.code].itemsize:
                raise ValueError(f"{file} does not hold {length} entries of {key}")
            return read_bytes(stored, sha256, key).view(_DTYPES[stored.code])
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"checkpoint {self.path} is damaged: {what:.1000}. Resume from an earlier one.")


def _check_facts(facts: Mapping[str, Any]) -> None:
    """TypeError or KeyError where checkpoint.json, well-formed and signed, has not the parts that are read of it."""
    _need(facts["identity"], dict)
    _need(facts["identity"]["kind"], str)
    _need(facts["identity"]["base"], dict)
    _need(facts["numbers"], dict)
    progress = _need(facts["progress"], dict)
    for value in _need(progress["counters"], dict).values():
        _need(value, int)
    for group in _need(progress["param_groups"], list):
        _need(group, dict)
    for value in _need(progress["loss_scaler"], dict).values():
        _need(value, bool, int, float)
    if progress["lr_scheduler"] is not None:
        _need(progress["lr_scheduler"], dict)
    facts["client_state"]
    for file in _need(facts["files"], list):
        name = _need(_need(file, dict)["name"], str)
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise TypeError(f"{name!r} is no file of a checkpoint")
        for row in _need(file["vectors"], dict).values():
            length, sha256 = _need(row, list)
            _need(sha256, str)
            if _need(length, int) < 0:
                raise TypeError(f"{length} is no length")


def _need(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, got {value!r:.60}")
    return value


def restore(stored: Stored, vectors: Sequence[Vector]) -> None:
    """Give every vector its entries back. Collective over the world."""
    with together():
        for vector in vectors:
            vector.put(stored.read(vector.key, vector.start, vector.start + vector.length))


def _write_vectors(path: Path, vectors: Sequence[Vector]) -> dict[str, tuple[int, str]]:
    """Write one file; length and sha256 by key."""
    for vector in vectors:
        if vector.dtype not in DTYPE_CODES:
            raise ValueError(f"{vector.key} is {vector.dtype}, which no checkpoint holds; use another optimizer")
    # Wide items first keep all of them aligned.
    vectors = sorted(vectors, key=lambda vector: -vector.dtype.itemsize)
    keys = [vector.key for vector in vectors]
    max_bytes = sum(vector.dtype.itemsize * vector.length for vector in vectors)
    longest_code = max((DTYPE_CODES[vector.dtype] for vector in vectors), key=len, default="")
    file = StreamWriter(path, keys, max_bytes, longest_code)
    try:
        written = {}
        for vector in vectors:
            values = vector.get()
            assert values.dtype == vector.dtype, vector.key
            written[vector.key] = (vector.length, file.add(vector.key, values))
        file.close()
    finally:
        file.abandon()
    return written


def _write_manifest(path: Path, facts: Mapping[str, Any]) -> None:
    body = json.loads(json.dumps({"format": FORMAT, "version": VERSION, **facts}))  # as a reader will see it
    with open(path, "x", encoding="utf-8") as file:
        json.dump({**body, "sha256": _digest(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _publish(temporary: Path, path: Path) -> None:
    replaced = path.with_name(f".{path.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        path.rename(replaced)
    temporary.rename(path)
    shutil.rmtree(replaced, ignore_errors=True)

"""Rows of local files and of data sets on the hub, one dict each, with the place that an error message can name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from lota.data.options import DataPlan

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")

Row = tuple[str, dict[str, Any]]
"""Where the row is, for messages, and its fields."""


def find_files(patterns: Sequence[str]) -> list[Path]:
    """The files of paths and glob patterns (`**` goes into folders), sorted for a pattern, each once. ValueError for
    what is not there or not data."""
    found: list[Path] = []
    for pattern in patterns:
        is_file = Path(pattern).is_file()
        paths = [Path(pattern)] if is_file else sorted(Path(path) for path in glob(pattern, recursive=True))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ValueError(f"no such file: {pattern}")
        for path in paths:
            if path.suffix not in SUFFIXES:
                raise ValueError(f"expected a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {path}")
        found += paths
    once: dict[Path, Path] = {}
    for path in found:
        once.setdefault(path.resolve(), path)
    return list(once.values())


def named_files(plan: DataPlan) -> list[Path]:
    """All local files that the rows of a run come from, for training or evaluation."""
    given = [files for part in plan.parts for files in (part.source.train_file, part.source.eval_file) if files]
    return sorted(set(find_files([pattern for files in given for pattern in files])))


PIECE, NUM_PIECES = 1 << 20, 16


def file_identity(path: Path) -> dict[str, Any]:
    """Length and sha256 of a file; of one above 16 MiB, of 16 pieces of 1 MiB spread over it, the last at its end."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= NUM_PIECES * PIECE:
            digest.update(file.read())
        else:
            for number in range(NUM_PIECES):
                file.seek((size - PIECE) * number // (NUM_PIECES - 1))
                digest.update(file.read(PIECE))
    return {"bytes": size, "sha256": digest.hexdigest()}


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. All values of a .csv are text, exactly as they stand there."""
    # JSON is read here and not by `datasets`, which turns text that looks like a date into a timestamp.
    if path.suffix == ".jsonl" or (path.suffix == ".json" and not _is_list(path)):
        yield from _json_lines(path)
    elif path.suffix == ".json":
        yield from _json_list(path)
    else:
        table = _csv(path) if path.suffix == ".csv" else _built("parquet", path)
        for number, row in enumerate(table, start=1):
            yield f"{path}, row {number}", row


def hub_rows(name: str, config: str | None, split: str) -> Iterator[Row]:
    """The rows of a split of a data set on the hub."""
    for number, row in enumerate(hub_set(name, config, split), start=1):
        yield f"{name} ({split}), row {number}", row


def hub_set(name: str, config: str | None, split: str) -> Dataset:
    """A split of a data set on the hub, downloaded or found where it was cached."""
    try:
        return load_dataset(name, config, split=split)
    except OSError as error:  # no network, no such data set, no permission: all are of this family
        raise ValueError(
            f"dataset_name {name!r} cannot be loaded: {error}. Give its name on the hub, or local files as train_file"
        ) from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a .jsonl file; ValueError names the line that is not a JSON object."""
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"expected a .jsonl file (one JSON object a line), got {path}")
    (path,) = find_files([str(path)])
    return [row for _, row in _json_lines(path)]


def _json_lines(path: Path) -> Iterator[Row]:
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            place = f"{path}, line {number}"
            line = _decoded(raw, place, is_first=number == 1)
            if line.strip():
                yield place, _object(_parsed(line, place), place)


def _json_list(path: Path) -> Iterator[Row]:
    rows = _parsed(_decoded(path.read_bytes(), str(path), is_first=True), str(path))
    for number, row in enumerate(rows, start=1):
        place = f"{path}, row {number}"
        yield place, _object(row, place)


def _is_list(path: Path) -> bool:
    """Whether a .json file is one list of objects, and not one object a line."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        while not start:
            more = file.read(4096)
            if not more:
                break
            start = more.lstrip()
    return start.startswith(b"[")


def _decoded(raw: bytes, place: str, is_first: bool) -> str:
    """Text of UTF-8; a byte order mark at the start of a file is skipped."""
    if is_first and raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{place}: expected UTF-8, got UTF-16: save the file as UTF-8")
    try:
        return raw.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        part = raw[max(0, error.start - 10) : error.start + 10]
        raise ValueError(f"{place}: expected UTF-8, got {part!r}: save the file as UTF-8") from None


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{place}: JSON nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error


def _object(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(row).__name__}")
    return row


def _csv(path: Path) -> Dataset:
    """A table of text only: without features, '007' would become 7 and an answer 'NA' nothing."""
    try:
        start = pd.read_csv(path, nrows=1, dtype=str, na_filter=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path} holds no rows, not even a line with the names of the fields") from error
    if not isinstance(start.index, pd.RangeIndex):
        raise ValueError(f"{path}: the rows have more fields than the first line names; quote text that holds commas")
    if start.empty:
        raise ValueError(f"{path} holds no rows")
    features = Features({str(name): Value("string") for name in start.columns})
    return _built("csv", path, features=features, na_filter=False)


def _built(kind: str, path: Path, **options: Any) -> Dataset:
    try:
        return load_dataset(kind, data_files=[str(path)], split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as {kind}: {error.__cause__ or error}") from error

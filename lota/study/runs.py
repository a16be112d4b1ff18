"""What a study consists of: runs with their options, named by content, so that what is done is found again.

A run's options may name what other runs made and the study's data: `run:NAME//ticket`, `data:TASK/train.jsonl`. Its key
is a digest of the options with those names replaced by the other run's key and the file's digest: the same options on
the same base and data have the same key, whatever the run is called.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Measure:
    """What is scored. start: the model that the run began with. tasks: the new one first, then what is to be kept.
    alphas: points between start and outcome. generate: rows are answered in writing, and judged."""

    start: str
    tasks: tuple[str, ...]
    alphas: tuple[float, ...] = (1.0,)
    importance: str | None = None
    generate: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """One run. facts: columns of its rows in the table, which are no part of the key. keeps: what it makes stays on the
    disk, whether another run asks for it or not."""

    name: str
    kind: str
    options: Mapping[str, Any]
    measure: Measure | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    keeps: bool = False

    def needs(self) -> set[str]:
        """Names of the runs that must be there first."""
        told = [self.options] if self.measure is None else [self.options, vars(self.measure)]
        return {text.removeprefix("run:").split("//")[0] for text in _texts(told) if text.startswith("run:")}


class Plan:
    """Runs by name, their keys, and where their files are."""

    def __init__(self, out: Path, runs: Mapping[str, Run]) -> None:
        self._out, self.runs = out, dict(runs)
        self._keys: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._needed: set[str] = set()
        for run in self.runs.values():
            missing = run.needs() - self.runs.keys()
            assert not missing, f"{run.name} names runs that are not planned: {missing}"
            self._needed |= run.needs()

    def key(self, name: str) -> str:
        """16 hexadecimal digits."""
        if name not in self._keys:
            run = self.runs[name]
            content: list[Any] = [run.kind, self._named(dict(run.options))]
            if run.measure is not None:
                content.append(self._named(vars(run.measure)))
            self._keys[name] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        return self._keys[name]

    def folder(self, name: str) -> Path:
        """Where a run's files are."""
        return self._out / "runs" / self.key(name)

    def resolved(self, value: Any) -> Any:
        """Options with paths in place of names."""
        return _mapped(value, self._path)

    def keeps(self, name: str) -> bool:
        """Whether what it makes stays on the disk, for other runs."""
        return name in self._needed or self.runs[name].keeps

    def is_done(self, name: str) -> bool:
        """Whether its result is there, and what it is to keep."""
        folder = self.folder(name)
        return (folder / "result.json").is_file() and (not self.keeps(name) or (folder / "kept").is_file())

    def _path(self, text: str) -> str:
        if text.startswith("run:"):
            name, _, rest = text.removeprefix("run:").partition("//")
            return str(self.folder(name) / "run" / rest)
        return str(self._out / "data" / text.removeprefix("data:")) if text.startswith("data:") else text

    def _named(self, value: Any) -> Any:
        return _mapped(value, self._digest)

    def _digest(self, text: str) -> str:
        if text.startswith("run:"):
            name, _, rest = text.removeprefix("run:").partition("//")
            return f"run:{self.key(name)}//{rest}"
        if text.startswith("data:"):
            if text not in self._digests:
                self._digests[text] = digest(Path(self._path(text)))
            return f"data:{self._digests[text]}"
        return text


def digest(path: Path) -> str:
    """Of a file, or of all files in a folder."""
    made = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            made.update(file.name.encode() + file.read_bytes())
    return made.hexdigest()[:16]


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value

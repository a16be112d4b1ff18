"""One table of everything, as text and as JSON, written anew after every stage."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.runner import Result
from benchmarks.gpu.stages import Stage


class Report:
    """about: what was asked for, versions and source, as JSON. The machine is added once it is known."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder, self._about = folder, about
        self.results: list[Result] = []
        self._started = time.monotonic()

    def machine(self, found: dict[str, Any]) -> None:
        self._about["machine"] = found
        self.write()

    def add(self, result: Result) -> None:
        self.results.append(result)
        self.write()

    @property
    def status(self) -> int:
        """0 where at least one stage ran, and all that ran were right."""
        states = [result.state for result in self.results if result.ran]
        return 0 if states and set(states) == {"right"} else 1

    def write(self) -> None:
        content = {
            **self._about,
            "seconds": round(time.monotonic() - self._started, 1),
            "status": self.status,
            "stages": [_as_json(result) for result in self.results],
        }
        _replace(self._folder / "report.json", json.dumps(content, indent=1) + "\n")
        _replace(self._folder / "report.txt", self.text())

    def text(self) -> str:
        lines = list(_head(self._about))
        for result in self.results:
            lines += ["", *_stage_lines(result)]
        lines += ["", *_summary(self.results, time.monotonic() - self._started)]
        return "\n".join(lines) + "\n"


def line(result: Result) -> str:
    """A result in one line, as the command prints it while it runs."""
    took = f"{result.seconds:6.1f} s" if result.ran else " " * 8
    shortened = f" (shortened to {result.limit:.0f} of {result.stage.seconds:.0f} s)" if result.shortened else ""
    return f"{took}  {result.stage.name:<15}{result.state}{': ' if result.why else ''}{result.why}{shortened}"


def missing_lines(stages: Sequence[Stage], absent: dict[str, list[str]]) -> list[str]:
    """Which packages are missing, and which stages cannot run for it."""
    lines = []
    for package in dict.fromkeys(name for names in absent.values() for name in names):
        without = [stage.name for stage in stages if package in absent[stage.name]]
        lines.append(f"missing: {package}; without it these stages cannot run: {', '.join(without)}")
    return lines


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "name": result.stage.name,
        "tells": result.stage.tells,
        "state": result.state,
        "why": result.why,
        "seconds": round(result.seconds, 2),
        "limit": round(result.limit, 2),
        "wanted": result.stage.seconds,
        "shortened": result.shortened,
        "rows": [{key: value for key, value in row.items() if key != "stage"} for row in result.rows],
        "last_lines": result.tail,
    }


def _head(about: dict[str, Any]) -> Iterator[str]:
    for key in ("machine", "versions", "source", "asked"):
        values = about.get(key) or {}
        if values:
            yield f"{key}: " + ", ".join(f"{name} {value}" for name, value in values.items() if value != "")


def _stage_lines(result: Result) -> Iterator[str]:
    yield line(result).strip()
    yield f"  {result.stage.tells}"
    right = [row for row in result.rows if row["kind"] == "check" and row["is_right"]]
    if right:
        yield f"  {len(right)} checks are right"
    for row in result.rows:
        text = _row_line(row)
        if text:
            yield "  " + text
    for text in result.tail:
        yield "  | " + text


def _row_line(row: dict[str, Any]) -> str:
    kind = row["kind"]
    if kind == "check":
        return "" if row["is_right"] else f"WRONG {row['name']}: {row['detail']}"
    if kind == "figure":
        return f"{row['name']:<64}{row['value']:>12,.5g} {row['unit']}{_aim(row)}".rstrip()
    if kind == "left out":
        return f"left out: {row['name']} ({row['why']})"
    if kind == "traceback":
        return "\n  | ".join([f"traceback of {row['name']}", *row["text"].splitlines()[-12:]])
    return str(row["text"]) if kind == "note" else ""


def _aim(row: dict[str, Any]) -> str:
    text = f"   beside {row['beside']}" if row["beside"] else ""
    for key, word in (("at_least", "at least"), ("at_most", "at most")):
        if key in row:
            is_reached = row["value"] >= row[key] if key == "at_least" else row["value"] <= row[key]
            text += f"   aim: {word} {row[key]:,.5g}, {'reached' if is_reached else 'NOT REACHED'}"
    return text


def _summary(results: Sequence[Result], seconds: float) -> Iterator[str]:
    yield f"after {seconds:.0f} s:"
    for result in results:
        yield "  " + line(result)
    figures = [row for result in results for row in result.rows if row["kind"] == "figure"]
    aims = [row for row in figures if "at_least" in row or "at_most" in row]
    short = [row for row in aims if "NOT REACHED" in _aim(row)]
    yield f"  {len(figures)} figures; of {len(aims)} aims {len(aims) - len(short)} are reached"


def _replace(path: Path, text: str) -> None:
    """All or nothing, so that a reader never finds half a file."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)

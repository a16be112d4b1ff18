"""The one table of a study: a row for every run and every point between its start and its outcome, as runs.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lota.files import write_text
from lota.study.runs import Plan, Run

Rows = list[dict[str, Any]]
_JUDGED = ("refused", "answered")


def rows_of(plan: Plan) -> Rows:
    """Rows of all planned runs that are done and measured, in the order of the plan."""
    rows: Rows = []
    for run in plan.runs.values():
        if (run.measure is None and run.kind != "sequence") or not plan.is_done(run.name):
            continue
        result = json.loads((plan.folder(run.name) / "result.json").read_text(encoding="utf-8"))
        if run.measure is None:
            rows += _of_sequence(plan, run, result)
            continue
        names = [Path(task.removeprefix("data:")).name for task in run.measure.tasks]
        for point in result["points"]:
            rows.append(
                {"row": f"{run.name}@{point['alpha']:g}", "key": plan.key(run.name), **run.facts}
                | {"alpha": point["alpha"], "kl": point["kl"], "new_task": names[0], "old_task": names[-1]}
                | _named(point, names[0], "new") | _named(point, names[-1], "old")
                | {"general": point["general test"], "general_rise": point["general test rise"]}
                | {f"{n}_{part}": point[f"{n} {part}"] for n in _several(names) for part in ("dev", "test")}
                | {name.replace(" ", "_"): value for name, value in point.items() if name.endswith(_JUDGED)}
                | result["movement"]
                | {"num_trained": result["facts"].get("num_trained"), "run_seconds": result["seconds"]["run"]}
                | {"measure_seconds": result["seconds"]["measure"]}
            )  # fmt: skip
    return rows


def _of_sequence(plan: Plan, run: Run, result: Mapping[str, Any]) -> Rows:
    """A row for every stage and task: the task's loss after the stage, of which stage 0 is the base."""
    facts = {"key": plan.key(run.name), **run.facts, "run_seconds": result["seconds"]["run"]}
    return [
        {"row": f"{run.name}@{cell['after']}/{cell['task']}", **facts, "stage": int(cell["stage"])}
        | {"after": cell["after"], "new_task": cell["task"], "new_test": float(cell["loss"])}
        for cell in result["facts"]["matrix"]
    ]


def _several(names: Sequence[str]) -> Sequence[str]:
    """Tasks that get columns of their own: those of a merge."""
    return names if len(names) > 2 else ()


def _named(point: Mapping[str, float], task: str, role: str) -> dict[str, float]:
    return {
        f"{role}_dev": point[f"{task} dev"],
        f"{role}_test": point[f"{task} test"],
        f"{role}_test_stderr": point[f"{task} test stderr"],
        f"{role}_exact": point[f"{task} test exact"],
        f"{role}_dev_rise": point[f"{task} dev rise"],
        f"{role}_test_rise": point[f"{task} test rise"],
        f"{role}_test_rise_stderr": point[f"{task} test rise stderr"],
    }


def write(rows: Rows, path: Path) -> bool:
    """As CSV, figures with 6 digits; False, and nothing is written, where the file has them already."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)
    if path.is_file() and path.read_text(encoding="utf-8") == text.getvalue():
        return False
    write_text(path, text.getvalue())
    return True


def read(path: Path) -> Rows:
    """The rows of a runs.csv, numbers as numbers."""
    with open(path, encoding="utf-8", newline="") as file:
        return [{name: _number(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Rows:
    """Rows whose columns have these values."""
    return [dict(row) for row in rows if all(row.get(name) == value for name, value in wanted.items())]

"""The matrix task x stage: every task's figures on every model that a sequence had, and what they come to.

With R[k][j] what task j scores after stage k (0: the base), own(j) the stage that trained j, and n the last stage:

    average             mean over j of R[n][j]
    forgetting          mean over j of the best R[k][j], own(j) <= k < n, minus R[n][j]     (Chaudhry et al. 2018)
    backward transfer   mean over j of R[n][j] - R[own(j)][j]                    (Lopez-Paz and Ranzato 2017)
    forward transfer    mean over j of R[own(j) - 1][j] - R[0][j]                (the same; the base in place of chance)

for a score where more is better. Of a loss the signs are turned, so that forgetting above 0 is always a loss of ability
and a transfer above 0 always a gain. The means are over the tasks that are in the model after stage n; forgetting and
backward transfer over those trained before it, forward transfer over those that were not the first.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lota.files import write_text
from lota.sequence.state import Stage, State

METRICS = {"loss": -1.0, "exact_tokens": 1.0}
"""Each with the sign that makes more of it better."""
FIGURES = ("average", "forgetting", "backward_transfer", "forward_transfer")


@dataclass(frozen=True)
class Matrix:
    """stages, and the names of all tasks that any of them scored or trained: those trained first, in order."""

    stages: tuple[Stage, ...]
    tasks: tuple[str, ...]

    @classmethod
    def of(cls, state: State) -> Matrix:
        """The matrix of a sequence as far as it is known."""
        trained = [task.name for task in state.tasks if task.is_complete]
        scored = [name for stage in state.stages for name in stage.scores]
        return cls(tuple(state.stages), tuple(dict.fromkeys([*trained, *scored])))

    def value(self, stage: int, task: str, metric: str) -> float | None:
        """R[stage][task]; None where it was not scored."""
        return self.stages[stage].scores.get(task, {}).get(metric)

    def own(self, task: str) -> int | None:
        """The stage that trained the task; None where none did yet."""
        return next((number for number, stage in enumerate(self.stages) if stage.trained == task), None)

    def figures(self, metric: str, last: int | None = None) -> dict[str, float | None]:
        """What stage `last` (the last one) comes to; None for a figure that has no task, or lacks a score of one."""
        last = len(self.stages) - 1 if last is None else last
        better = METRICS[metric]
        on = [(task, own) for task in self.stages[last].tasks if (own := self.own(task)) is not None]
        earlier = [(task, own) for task, own in on if own < last]
        now = {task: self.value(last, task, metric) for task, _ in on}

        def gain(task: str, stage: int, since: int) -> float | None:
            one, other = self.value(stage, task, metric), self.value(since, task, metric)
            return None if one is None or other is None else better * (one - other)

        def lost(task: str, own: int) -> float | None:
            gains = [gain(task, last, stage) for stage in range(own, last)]
            known = [value for value in gains if value is not None]
            return -min(known) if known else None

        return {
            "average": _mean(list(now.values())),
            "forgetting": _mean([lost(task, own) for task, own in earlier]),
            "backward_transfer": _mean([gain(task, last, own) for task, own in earlier]),
            "forward_transfer": _mean([gain(task, own - 1, 0) for task, own in on if own > 1]),
        }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def write_tables(matrix: Matrix, folder: Path) -> None:
    """matrix.csv, a row a stage and task; summary.csv, a row a stage."""
    counted = ("loss", "exact_tokens", "exact_tokens_stderr", "num_rows", "num_answer_tokens")
    cells = [
        [number, stage.after, task, int(task in stage.tasks), *(_cell(stage.scores[task].get(n)) for n in counted)]
        for number, stage in enumerate(matrix.stages)
        for task in matrix.tasks
        if task in stage.scores
    ]
    write_text(folder / "matrix.csv", _csv(["stage", "after", "task", "is_trained", *counted], cells))
    lines = []
    for number, stage in enumerate(matrix.stages):
        figures = {metric: matrix.figures(metric, number) for metric in METRICS}
        values = [_cell(figures[metric][name]) for metric in METRICS for name in FIGURES]
        lines.append([number, stage.after, len(stage.tasks), *values])
    header = ["stage", "after", "num_tasks", *(f"{metric}_{name}" for metric in METRICS for name in FIGURES)]
    write_text(folder / "summary.csv", _csv(header, lines))


def table(matrix: Matrix, metric: str) -> list[str]:
    """The matrix in lines: stages down, tasks across; brackets where a task is not in the model."""
    rows = [["after", *matrix.tasks]]
    for number, stage in enumerate(matrix.stages):
        cells = []
        for task in matrix.tasks:
            value = matrix.value(number, task, metric)
            text = "-" if value is None else f"{value:.3f}"
            cells.append(text if task in stage.tasks else f"({text})")
        rows.append([stage.after, *cells])
    return [metric, *aligned(rows)]


def figure_lines(matrices: Sequence[tuple[str, Matrix]], metric: str) -> list[str]:
    """What sequences came to, a line each."""
    rows = [[metric, *(name.replace("_", " ") for name in FIGURES)]]
    for title, matrix in matrices:
        figures = matrix.figures(metric)
        rows.append([title, *("-" if figures[n] is None else f"{figures[n]:+.3f}" for n in FIGURES)])
        rows[-1][1] = rows[-1][1].removeprefix("+")
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of one width, the first to the left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def _cell(value: float | None) -> str:
    """As exact as it is."""
    return "" if value is None else str(int(value)) if float(value).is_integer() else repr(value)


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue()

"""`lota study`: the runs of a preset's questions, done where they are not done yet, and what comes out of them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lota.files import only_writer, write_text
from lota.messages import did_you_mean
from lota.study import rows as table
from lota.study import tables
from lota.study.figures import draw
from lota.study.jobs import Job
from lota.study.methods import base_run
from lota.study.prepare import prepare
from lota.study.presets import Preset
from lota.study.questions import QUESTIONS
from lota.study.rows import Rows
from lota.study.runs import Plan, Run
from lota.study.workers import Workers


@dataclass(frozen=True)
class Place:
    """Where a study is, and on how many processes it runs. minutes: after which it stops, to be resumed."""

    out: Path
    data: Path | None
    workers: int
    minutes: float | None = None
    begun: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float | None:
        """None without an end."""
        return None if self.minutes is None else max(0.0, 60 * self.minutes - (time.monotonic() - self.begun))


class TimeIsOver(Exception):
    """The minutes of a study are over; what is not done is left for the next call."""


def study(preset: Preset, place: Place) -> Rows:
    """All of it; the rows. What is done already is not done again: the same call resumes where it was stopped."""
    place.out.mkdir(parents=True, exist_ok=True)
    with only_writer(place.out / "study", "runs the study in"):
        prepare(preset.data, preset.tasks.all(), place.data, place.out / "data", say)
        rows: Rows = []
        while True:
            plan = planned(preset, place.out, rows)
            num_done = execute(plan, place)
            found = table.rows_of(plan)
            if num_done == 0 and found == rows:
                return rows
            rows = found
            report(preset, rows, place.out)


def report(preset: Preset, rows: Rows, out: Path) -> None:
    """runs.csv, and tables and figures made from it."""
    if table.write(rows, out / "runs.csv"):
        rows = table.read(out / "runs.csv")
        write_text(out / "tables.md", tables.page(preset, rows))
        draw(preset, rows, out / "figures")


def recompute(preset: Preset, place: Place, row: str) -> bool:
    """Do the run of one row of runs.csv again, elsewhere; whether both losses agree within the row's 95% intervals."""
    path = place.out / "runs.csv"
    rows = table.read(path) if path.is_file() else []
    known = next((found for found in rows if found["row"] == row), None)
    if known is None:
        near = did_you_mean(row, [str(found["row"]) for found in rows])
        raise ValueError(f"{path} has no row {row!r}{near}")
    name, _, alpha = row.rpartition("@")
    folder = place.out / "recomputed"
    shutil.rmtree(folder, ignore_errors=True)
    plan = planned(preset, place.out, rows)
    workers = Workers(1)
    try:
        workers.start(job_of(plan, name, place, folder))
        (_, result), *_ = list(workers.finished())
    finally:
        workers.close()
    point = next(point for point in result["points"] if point["alpha"] == float(alpha))
    agrees = True
    for role in ("new", "old"):
        before, now = known[f"{role}_test"], point[f"{known[f'{role}_task']} test"]
        half = 1.96 * known[f"{role}_test_stderr"]
        agrees &= abs(now - before) <= half
        say(f"{row}: {known[f'{role}_task']} {before:.4f} ± {half:.4f} in the table, {now:.4f} now")
    say("agrees" if agrees else "differs by more than its interval")
    return agrees


def show_plan(preset: Preset, place: Place) -> None:
    """Print the runs of the first round, whether they are done, and what is left in core-minutes."""
    plan = planned(preset, place.out, [])
    seconds = {name: estimate(preset, run) for name, run in plan.runs.items()}
    for name, run in plan.runs.items():
        print(f"{run.kind:<11}{seconds[name] / 60:6.1f} min  {name}")
    repeats = len(preset.seeds) - 1
    print(
        f"{len(plan.runs)} runs, about {sum(seconds.values()) / 60:.0f} core-minutes at {SPEED / 1e9:g} GFLOP/s; "
        f"the settings on every frontier are then repeated at {repeats} more seeds, and question 4 begins"
    )


SPEED = 80e9
"""Floating-point operations a second that one core of today does in a small model's training."""


def estimate(preset: Preset, run: Run) -> float:
    """Seconds on one core: six operations a weight and token, and a third of that to score."""
    size, length = preset.base.num_parameters, preset.data.max_length
    if run.kind == "base":
        tokens = preset.base.steps * preset.base.batch_rows * preset.base.max_length
        return 6 * size * tokens / SPEED
    steps = run.options.get("max_steps", 0) + run.options.get("calibration_steps", 0)
    steps *= len(run.options.get("tasks", [0]))
    tokens = 0.5 * length * steps * preset.batch_rows
    points = 0 if run.measure is None else len(run.measure.alphas) * len(run.measure.tasks)
    tokens += 0.5 * length * points * (preset.data.num_dev + preset.data.num_test) / 3
    return 6 * size * tokens / SPEED + 3


def planned(preset: Preset, out: Path, rows: Rows) -> Plan:
    """The runs that the questions want, given the rows that are known. Of equal names the first counts."""
    runs: dict[str, Run] = {}
    wanted: Iterable[Run] = [base_run(preset)]
    for run in wanted:
        runs[run.name] = run
    for name in preset.questions:
        for run in QUESTIONS[name](preset, rows):
            runs.setdefault(run.name, run)
    return Plan(out, runs)


def execute(plan: Plan, place: Place) -> int:
    """Do what is not done, each run after those that it needs; how many that was."""
    todo = {plan.key(name): name for name in plan.runs if not plan.is_done(name)}  # each content once
    left = list(todo.values())
    if not left:
        return 0
    say(f"{len(plan.runs)} runs, {len(left)} of them to do")
    workers, started, num_done = Workers(place.workers), time.monotonic(), 0
    running: set[str] = set()
    try:
        while left or running:
            for name in list(left):
                waits = any(not plan.is_done(other) for other in plan.runs[name].needs())
                if not workers.num_free or waits or (plan.runs[name].kind == "base" and running):
                    continue
                left.remove(name)
                running.add(name)
                workers.start(job_of(plan, name, place))
            assert running, f"{left[0]} waits for something that nobody makes"
            if place.seconds_left == 0.0:
                raise TimeIsOver(f"{len(left) + len(running)} runs are left: the same command does them")
            for job, result in workers.finished(place.seconds_left):
                running.discard(job.name)
                num_done += 1
                minutes = (time.monotonic() - started) / 60
                say(f"{num_done} done, {len(left) + len(running)} left, {minutes:.1f} min: {summary(job.name, result)}")
    finally:
        workers.close()
    return num_done


def job_of(plan: Plan, name: str, place: Place, folder: Path | None = None) -> Job:
    """What a worker is told. folder: another place than the run's own."""
    run = plan.runs[name]
    measure = None if run.measure is None else plan.resolved(vars(run.measure))
    start = "none" if run.measure is None else run.measure.start.removeprefix("run:").split("//")[0]
    starts = place.out / "starts" / f"{plan.key(start) if start in plan.runs else start}.json"
    return Job(
        name=name,
        kind=run.kind,
        options=plan.resolved(dict(run.options)),
        measure=measure,
        folder=folder or plan.folder(name),
        data=place.out / "data",
        starts=starts,
        keeps=plan.keeps(name) and folder is None,
        threads=place.workers if run.kind == "base" else 1,
    )


def summary(name: str, result: dict[str, Any]) -> str:
    """One line about a run that is done."""
    text = f"{name}, {result['seconds']['run']:.0f} s"
    if result.get("points"):
        point = result["points"][0]
        losses = {key.removesuffix(" test"): value for key, value in point.items() if key.endswith(" test")}
        text += f" + {result['seconds']['measure']:.0f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items())
    return text


def say(text: str) -> None:
    print(f"[study] {text}", flush=True)

"""`lota study`: the runs of a preset's questions, done where they are not done yet, and what comes out of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lota.files import only_writer
from lota.study import rows as table
from lota.study.jobs import Job
from lota.study.prepare import prepare
from lota.study.presets import Preset
from lota.study.questions import QUESTIONS, base_run
from lota.study.rows import Rows
from lota.study.runs import Plan, Run
from lota.study.workers import Workers


@dataclass(frozen=True)
class Place:
    """Where a study is, and on how many processes it runs."""

    out: Path
    data: Path | None
    workers: int


def study(preset: Preset, place: Place) -> Rows:
    """All of it; the rows. What is done already is not done again: the same call resumes where it was stopped."""
    place.out.mkdir(parents=True, exist_ok=True)
    with only_writer(place.out / "study", "runs the study in"):
        prepare(preset.data, preset.tasks.all(), place.data, place.out / "data", say)
        rows: Rows = []
        while True:
            plan = planned(preset, place.out, rows)
            execute(plan, place)
            found = table.rows_of(plan)
            if found == rows:
                break
            rows = found
            table.write(rows, place.out / "runs.csv")
    return rows


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


def execute(plan: Plan, place: Place) -> None:
    """Do what is not done, each run after those that it needs."""
    todo = {plan.key(name): name for name in plan.runs if not plan.is_done(name)}  # each content once
    left = list(todo.values())
    if not left:
        return
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
            for job, result in workers.finished():
                running.discard(job.name)
                num_done += 1
                minutes = (time.monotonic() - started) / 60
                say(f"{num_done} done, {len(left) + len(running)} left, {minutes:.1f} min: {summary(job.name, result)}")
    finally:
        workers.close()


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
        keeps=plan.is_needed(name) and folder is None,
        threads=place.workers if run.kind == "base" else 1,
    )


def summary(name: str, result: dict) -> str:  # type: ignore[type-arg]
    """One line about a run that is done."""
    text = f"{name}, {result['seconds']['run']:.0f} s"
    if result.get("points"):
        point = result["points"][0]
        losses = {key.removesuffix(" test"): value for key, value in point.items() if key.endswith(" test")}
        text += f" + {result['seconds']['measure']:.0f} s, " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items())
    return text


def say(text: str) -> None:
    print(f"[study] {text}", flush=True)


def load(out: Path, name: str) -> dict:  # type: ignore[type-arg]
    return dict(json.loads((out / name).read_text(encoding="utf-8")))

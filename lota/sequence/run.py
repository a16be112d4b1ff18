"""A sequence of tasks, trained one after another into one model: each through the phases of one run, on what the tasks
before it left; after each, all are scored and the ledger is written. The same command again continues.

Every rank runs it, under `lota.ranks.process.run_job`; rank 0 writes.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lota.files import only_writer
from lota.ranks.agree import check_output_dir, check_same, checked_together, from_rank_0, together
from lota.ranks.process import begun, watch_ranks
from lota.ranks.stop import leave_if_asked, listening
from lota.ranks.world import join_world, print_once, rank
from lota.retention.importance import FILE_NAME
from lota.run import resume_checks
from lota.run.folder import versions
from lota.sequence import books, matrix
from lota.sequence.checks import Base, Prepared, prepare, write_options
from lota.sequence.config import BASE, Options, SequenceConfig, Task, read
from lota.sequence.ledger import Ledger
from lota.sequence.remove import remove
from lota.sequence.scores import fill_in
from lota.sequence.state import Stage, State, TaskState
from lota.ticket import Mask
from lota.train import job

ADVICE = " The same command again resumes it."


def main(argv: list[str] | None = None) -> None:
    """`CONFIG [--option value ...]` trains, or continues; `FOLDER --remove NAME` takes a task out again. argv: None
    takes sys.argv."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--remove" in argv:
        remove(argv)
        return
    with listening(), ExitStack() as closing:
        run = _open(argv, closing)
        _score(run)
        for number, task in enumerate(run.config.tasks, start=1):
            known = run.state.task(task.name)
            if known is None or not known.is_complete:
                leave_if_asked(f"before task {task.name}")
                print_once(f"task {number} of {len(run.config.tasks)}: {task.name}")
                _train(run, task)
                _score(run)
        _finish(run)


@dataclass
class _Run:
    """A sequence in this process. ledger: on rank 0, of the tickets that `state` has in the model."""

    config: SequenceConfig
    folder: Path
    state: State
    base: Base
    prepared: list[Prepared]
    ledger: Ledger | None = None

    @property
    def is_writer(self) -> bool:
        return rank() == 0

    def write(self) -> None:
        """sequence.json, on rank 0."""
        if self.is_writer:
            self.state.write(self.folder)


def _open(argv: Sequence[str], closing: ExitStack) -> _Run:
    """Check everything, then take the folder. Collective."""
    join_world()
    with checked_together():
        config = read(argv)
    watch_ranks()
    folder = config.output_dir

    def look() -> State | None:
        closing.enter_context(only_writer(folder.absolute(), "trains a sequence in"))
        return books.open_state(folder)

    found = from_rank_0(look)
    with checked_together():
        if found is not None:
            config = _without_removed(config, found)
            _check_order(config.tasks, found, folder)
            _check_importance(config.tasks, found, folder)
        complete = [] if found is None else [task.name for task in found.tasks if task.is_complete]
        try:
            base, prepared = prepare(config, complete)
        finally:
            _forget()
        settings = {**base.settings(), "dtype": prepared[0].dtype, "eval_rows_limit": config.eval_rows_limit}
        state = State(config.method, settings) if found is None else found
        _check_same_sequence(config, state, settings, prepared, folder)
    check_same("evaluation rows", {task.name: task.identity for task in prepared})
    check_output_dir(folder)
    run = _Run(config, folder, state, base, prepared)
    state.rows |= {task.name: task.identity for task in prepared}
    if not state.stages:
        state.stages.append(Stage(BASE, "", ()))
    with together():
        run.write()
        if run.is_writer:
            books.write_config(folder, config.content)
    begun()
    return run


def _without_removed(config: SequenceConfig, state: State) -> SequenceConfig:
    """The configuration without tasks that were removed: they stay so."""
    removed = {task.name for task in state.tasks if task.is_removed}
    left = tuple(task for task in config.tasks if task.name not in removed)
    for task in config.tasks:
        if task.name in removed:
            print_once(f"task {task.name} was removed and is left out; to train it again, give it another name")
    if not left:
        raise ValueError("all tasks were removed: add one")
    content = {**config.content, "tasks": [t for t in config.content["tasks"] if t["name"] not in removed]}
    return SequenceConfig(
        config.output_dir, config.method, left, config.eval_rows_limit, config.keep_models, config.words, content
    )


def _check_order(tasks: Sequence[Task], state: State, folder: Path) -> None:
    """ValueError unless the tasks that were trained come first, in their order; others may follow."""
    trained = [task.name for task in state.tasks if not task.is_removed]
    names = [task.name for task in tasks]
    if names[: len(trained)] == trained:
        return
    missing = [name for name in trained if name not in names]
    cure = (
        f"{missing[0]} is missing: put it back, or remove it with lota sequence {folder} --remove {missing[0]}"
        if missing
        else "put them in that order: tasks are added at the end"
    )
    raise ValueError(f"{folder} has trained {', '.join(trained)}, and the tasks are {', '.join(names)}; {cure}")


def _check_importance(tasks: Sequence[Task], state: State, folder: Path) -> None:
    """ValueError where a task that is still to come is pulled to what an earlier one needs, and that was not kept."""
    complete = state.on_model
    coming = [task for task in tasks if task.keeps_old and task.name not in [each.name for each in complete]]
    lacking = [task.name for task in complete if not (folder / task.folder / "ticket" / FILE_NAME).is_file()]
    if coming and lacking:
        raise ValueError(
            f"task {coming[0].name} has a pull to what {lacking[0]} needs, which was not kept when it was trained "
            "without one: set retain_earlier: false for it and name what is to be kept, retain: [{train_file: FILE}]"
        )


def _check_same_sequence(
    config: SequenceConfig, state: State, settings: dict[str, Any], prepared: Sequence[Prepared], folder: Path
) -> None:
    """ValueError, naming what differs, where the folder's figures or tasks are of another configuration."""
    before = {"method": state.method, **state.settings}
    now = {"method": config.method, **settings}
    differing = [f"{name} was {before.get(name)!r}, now {value!r}" for name, value in now.items()
                 if value != before.get(name)]  # fmt: skip
    if differing:
        raise ValueError(
            f"output_dir {folder} holds a sequence with different settings ({'; '.join(differing)}), with which its "
            "figures could not be compared: give those, or another output_dir"
        )
    for task, found in zip(config.tasks, prepared, strict=True):
        if state.rows.get(found.name, found.identity) != found.identity:
            raise ValueError(
                f"task {found.name}: the evaluation rows are not those that were scored before: put the file back, or "
                "begin in another output_dir"
            )
        entry = state.task(found.name)
        if entry is not None:
            try:
                resume_checks.check_options(entry.options, _asked(task, found), folder / entry.folder)
            except ValueError as error:
                raise ValueError(f"task {found.name}: {error}") from None


def _asked(task: Task, prepared: Prepared) -> dict[str, Any]:
    """The options of a task, for comparing."""
    own = {"disjoint": task.disjoint, "retain_earlier": task.retain_earlier, "pull": task.pull}
    return {name: value for name, value in prepared.options.items() if name != "output_dir"} | own


def _train(run: _Run, task: Task) -> None:
    """Train a task on what is in the model now, through the phases of one run. Collective."""
    state = run.state
    entry = state.task(task.name)
    if entry is None:
        prepared = next(each for each in run.prepared if each.name == task.name)
        entry = TaskState(
            task.name, state.next_folder(task.name), _asked(task, prepared), task.disjoint, task.retain_earlier
        )
        state.tasks.append(entry)
        with together():
            run.write()
            if run.is_writer:
                books.begin_again(run.folder)
    path = run.folder / entry.folder
    is_begun, is_complete = from_rank_0(lambda: ((path / "config.yaml").is_file(), (path / "summary.json").is_file()))
    if not is_complete:
        options = from_rank_0(lambda: stage_options(run.config, task, state, run.folder))
        if is_begun:
            options["resume_from_checkpoint"] = "true"
        try:
            with TemporaryDirectory() as folder:
                job.main(["--config", str(write_options(Path(folder), options))])
        finally:
            _forget()
    entry.is_complete = True
    if run.config.is_sparse:
        run.ledger = None
        with together():
            if run.is_writer:
                run.ledger = books.ledger_of(state, run.folder, print_once)
        entry.num_shared = from_rank_0(lambda: run.ledger.tasks[-1].num_shared if run.ledger else 0)
        assert not (entry.disjoint and entry.num_shared), f"{task.name} shares {entry.num_shared} protected entries"
    state.stages.append(Stage(task.name, task.name, tuple(each.name for each in state.on_model)))
    with together():
        run.write()


def stage_options(config: SequenceConfig, task: Task, state: State, folder: Path) -> Options:
    """The options of the run that trains a task next. ValueError where its own mask has entries of earlier tasks and
    should not."""
    earlier = state.on_model
    entry = state.task(task.name)
    assert entry is not None
    options = {name: value for name, value in task.options.items() if value is not None}
    options["output_dir"] = str(folder / entry.folder)
    if not config.is_sparse:
        options["merged"] = True  # which the next task begins with
        if earlier:
            options["model_name_or_path"] = str(folder / earlier[-1].folder / "merged")
            options.pop("model_revision", None)
        return options
    tickets = [str(path) for path in books.ticket_paths(state, folder).values()]
    if tickets:
        options["tickets"] = tickets
    if task.disjoint and tickets and options.get("mask"):
        mask = Mask.load(options["mask"])
        for other, path in zip(earlier, tickets):
            shared = mask.overlap(Mask.load(path))
            if shared:
                raise ValueError(
                    f"task {task.name}: its mask shares {shared} entries with {other.name}: give another mask, or let "
                    "it overlap (disjoint: false)"
                )
    if tickets and not task.disjoint:
        options["overlap"] = True
    if any(each.keeps_old for each in config.tasks):
        options["keep_importance"] = True
    retain = [*_listed(options.pop("retain", None)), *(tickets if task.keeps_old else [])]
    if retain and task.pull != 0:
        options["retain"] = retain
        if task.pull is not None:
            options["pull"] = task.pull
    return options


def _listed(value: Any) -> list[Any]:
    """The items of an option that YAML, or text of it, gives as one item or a list."""
    value = yaml.safe_load(value) if isinstance(value, str) else value
    return [] if value is None else value if isinstance(value, list) else [value]


def _score(run: _Run) -> None:
    """Score all tasks where figures are missing, and write tables and pictures. Collective."""
    fill_in(run.state, run.folder, run.base, run.prepared, run.write)
    with together():
        if run.is_writer:
            books.write_matrix(run.state, run.folder)
            if run.config.is_sparse and run.state.on_model:
                run.ledger = run.ledger or books.ledger_of(run.state, run.folder, print_once)
                books.write_ledger(run.state, run.ledger, run.folder)
            if not run.config.is_sparse and not run.config.keep_models:
                for task in run.state.on_model[:-1]:
                    shutil.rmtree(run.folder / task.folder / "merged", ignore_errors=True)
    last = run.state.stages[-1]
    if last.trained:
        print_once(
            f"after {last.after}: " + ", ".join(f"{n} {s['loss']:.3f}" for n, s in last.scores.items()) + " nats"
        )
    leave_if_asked("after an evaluation")


def _finish(run: _Run) -> None:
    """The figures on the terminal, and summary.json."""
    with together():
        if run.is_writer:
            books.write_summary(run.state, run.folder, {"versions": versions()})
    found = matrix.Matrix.of(run.state)
    for metric in matrix.METRICS:
        for line in [*matrix.table(found, metric), *matrix.figure_lines([("the sequence", found)], metric)[0:2]]:
            print_once(line)
    print_once(f"done; {run.folder / books.SUMMARY_NAME} has the figures")


def _forget() -> None:
    """Let go of what a run, or its options, left process-wide: with ZeRO-3 registered, models would load in parts."""
    unset_hf_deepspeed_config()
    gc.collect()
    AcceleratorState._reset_state(True)

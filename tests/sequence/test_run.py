"""Sequences on real ranks: a stage is what `lota train` makes of the same options, any stop is continued to the same
bytes, tasks are added later, and what would mix two sequences is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lota.files import only_writer
from lota.sequence.config import read
from lota.sequence.run import stage_options
from lota.sequence.state import TaskState, read_state
from lota.ticket import Mask, Ticket
from tests.sequence import folders, tasks
from tests.train import jobs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.make_world(tmp_path_factory.mktemp("world"))


def config(world: Path, path: Path, names: list[str], **changes: Any) -> str:
    return tasks.write(path, tasks.content(world, [tasks.task(world, name) for name in names], **changes))


def run(pool: Any, *argv: str) -> None:
    pool.run(jobs.run_recipe, "train_sequence", list(argv), timeout=900)


def errors(pool: Any, *argv: str) -> str:
    """What every rank raises alike: its last line."""
    outcomes = pool.outcomes(jobs.run_recipe, "train_sequence", list(argv))
    assert {outcome.error_type for outcome in outcomes} == {"ValueError"}, [outcome.error for outcome in outcomes]
    (line,) = {outcome.error.strip().splitlines()[-1] for outcome in outcomes}
    return line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


CHECKPOINTS = {"save_strategy": "steps", "save_steps": 3}


@pytest.fixture(scope="module")
def one(ranks, world: Path) -> Path:
    """A sequence of one ticket on two ranks, that never stopped."""
    path = config(world, world / "one.yaml", ["copy"], **CHECKPOINTS)
    run(ranks(2), path, "--output_dir", str(world / "one"))
    return world / "one"


def test_a_first_task_is_a_run_of_its_own(ranks, world: Path, one: Path, tmp_path: Path) -> None:
    options = tasks.content(world, [], **CHECKPOINTS) | tasks.task(world, "copy")
    alone = {name: value for name, value in options.items() if name not in ("tasks", "name")}
    path = tasks.write(tmp_path / "run.yaml", alone)
    ranks(2).run(jobs.run_recipe, "train_lota", ["--config", path, "--output_dir", str(tmp_path / "run")])
    for name in ("ticket.safetensors", "ticket.json"):
        assert (one / "01-copy" / "ticket" / name).read_bytes() == (tmp_path / "run" / "ticket" / name).read_bytes()

    left = {"01-copy", "config.yaml", "ledger.json", "ledger.png", "matrix.csv", "matrix.png"}
    assert {path.name for path in one.iterdir()} == left | {"sequence.json", "summary.csv", "summary.json"}
    rows = list(csv.DictReader((one / "matrix.csv").open(encoding="utf-8")))
    assert [(row["stage"], row["after"], row["task"], row["is_trained"]) for row in rows] == [
        ("0", "base", "copy", "0"), ("1", "copy", "copy", "1")
    ]  # fmt: skip
    training = jobs.summary(one / "01-copy")["training"]
    for row, name in zip(rows, ("eval_loss_before", "eval_loss")):
        assert float(row["loss"]) == pytest.approx(training[name], rel=1e-5)  # the Trainer's mean of the same rows
    told = json.loads((one / "ledger.json").read_text(encoding="utf-8"))
    ticket = Ticket.load(one / "01-copy" / "ticket")
    assert told["free"] == ticket.mask.eligible - ticket.num_active and told["eligible"] == ticket.mask.eligible
    assert told["tasks"][0]["kept"]["loss"] == {
        "base": float(rows[0]["loss"]), "own": float(rows[1]["loss"]), "now": float(rows[1]["loss"])
    }  # fmt: skip
    assert jobs.summary(one)["tasks"][0]["num_active"] == ticket.num_active


STOPS = {
    "before the base was scored": ("01-copy", "matrix.csv"),
    "in training": ("01-copy/checkpoint-6", "01-copy/ticket", "01-copy/summary.json", "01-copy/report.png"),
    "before its summary": ("01-copy/summary.json",),
    "before it was noted": (),
    "before it was scored": (),
}


@pytest.mark.parametrize("when", STOPS)
def test_the_same_command_continues_from_anywhere(ranks, world: Path, one: Path, tmp_path: Path, when: str) -> None:
    """The folder as a process that was killed leaves it: what comes later is not there, the state is of then."""
    out = tmp_path / "out"
    shutil.copytree(one, out)
    for name in (*STOPS[when], "summary.json", "summary.csv", "ledger.json", "ledger.png", "matrix.png"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    state = read_state(out)
    if when != "before it was scored":
        del state.stages[1]
        state.tasks[0].is_complete = False
    else:
        state.stages[1].scores.clear()
    if when == "before the base was scored":
        state.stages[0].scores.clear()
        state.tasks.clear()
    state.write(out)
    run(ranks(2), str(world / "one.yaml"), "--output_dir", str(out))
    expected = contents(one)
    found = contents(out)
    assert found.keys() == expected.keys()
    same = ("sequence.json", "matrix.csv", "summary.csv", "ledger.json", "matrix.png", "ledger.png")
    for name in (*same, "01-copy/ticket/ticket.safetensors", "01-copy/mask/ticket.safetensors"):
        assert found[name] == expected[name], name
    if when == "in training":
        assert jobs.summary(out / "01-copy")["training"]["resumed_from_step"] == 3


def test_a_complete_sequence_is_left_as_it_is(ranks, world: Path, one: Path) -> None:
    before = contents(one)
    run(ranks(2), str(one))
    after = contents(one)
    assert after.keys() == before.keys()
    assert {name for name in before if before[name] != after[name]} <= {"config.yaml"}  # where output_dir is named


def test_what_would_mix_two_sequences_is_refused(ranks, world: Path, one: Path, tmp_path: Path) -> None:
    pool, path = ranks(2), str(world / "one.yaml")
    before = contents(one)
    here = ("--output_dir", str(one))
    assert "task copy: output_dir" in (line := errors(pool, path, *here, "--max_steps", "7"))
    assert "holds a run with different options (max_steps was 6, now 7)" in line
    assert "disjoint was True, now False" in errors(pool, path, *here, "--disjoint", "false")
    line = errors(pool, path, *here, "--eval_rows_limit", "5")
    assert "holds a sequence with different settings (eval_rows_limit was 256, now 5)" in line
    assert "method was 'lota', now 'full'" in errors(pool, path, *here, "--method", "full")
    other = config(world, tmp_path / "other.yaml", ["sort", "copy"], **CHECKPOINTS)
    assert "put them in that order: tasks are added at the end" in errors(pool, other, *here)
    other = config(world, tmp_path / "other.yaml", ["sort"], **CHECKPOINTS)
    assert f"copy is missing: put it back, or remove it with lota sequence {one} --remove copy" in errors(
        pool, other, *here
    )
    rows = (world / "copy_test.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "copy.jsonl").write_text("\n".join(rows[:-1]), encoding="utf-8")
    changed = [tasks.task(world, "copy") | {"eval_file": str(tmp_path / "copy.jsonl")}]
    other = tasks.write(tmp_path / "other.yaml", tasks.content(world, changed, **CHECKPOINTS))
    assert "task copy: the evaluation rows are not those that were scored before" in errors(pool, other, *here)
    assert "holds something that is no sequence (base, " in errors(pool, path, "--output_dir", str(world))
    with only_writer(one, "trains a sequence in"):
        assert "trains a sequence in" in errors(pool, path, *here)
    assert contents(one) == before
    assert "task none" not in errors(pool, path, "--output_dir", str(tmp_path / "new"), "--learning_rate", "0")
    assert not (tmp_path / "new").exists(), "a refusal leaves nothing behind"


@pytest.mark.parametrize("method", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_rivals_train_the_same_tasks_in_sequence(ranks, world: Path, tmp_path: Path, method: str) -> None:
    """Each begins with the model that the one before left; of those models only the last stays; a third task is added
    when two are complete."""
    out, pool = tmp_path / "out", ranks(2)
    path = config(world, tmp_path / "two.yaml", ["copy", "sort"], max_steps=4)
    words = ("--output_dir", str(out), "--method", method)
    run(pool, path, *words, "--keep_models", "true")
    models = [load_file(out / name / "merged" / "model.safetensors") for name in ("01-copy", "02-sort")]
    alone = tmp_path / "alone"
    options = {
        **tasks.content(world, []),
        **tasks.task(world, "sort"),
        "max_steps": 4,
        "method": method,
        "merged": True,
    }
    options["model_name_or_path"] = str(out / "01-copy" / "merged")
    made = {name: value for name, value in options.items() if name not in ("tasks", "name")}
    argv = ["--config", tasks.write(tmp_path / "alone.yaml", made), "--output_dir", str(alone)]
    pool.run(jobs.run_recipe, "train_lota", argv)
    second = load_file(alone / "merged" / "model.safetensors")
    assert all(torch.equal(second[name], tensor) for name, tensor in models[1].items())
    assert not all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    before = read_state(out)
    training = [jobs.summary(out / name)["training"] for name in ("01-copy", "02-sort")]
    assert before.stages[1].scores["sort"]["loss"] == pytest.approx(training[1]["eval_loss_before"], rel=1e-5)
    assert before.stages[2].scores["sort"]["loss"] == pytest.approx(training[1]["eval_loss"], rel=1e-5)

    path = config(world, tmp_path / "three.yaml", ["copy", "sort", "shift"], max_steps=4)
    run(pool, path, *words)
    after = read_state(out)
    assert [stage.after for stage in after.stages] == ["base", "copy", "sort", "shift"]
    for old, new in zip(before.stages, after.stages):
        assert {name: new.scores[name] for name in old.scores} == old.scores
    assert all(set(stage.scores) == {"copy", "sort", "shift"} for stage in after.stages)
    assert [path.parent.name for path in sorted(out.glob("*/merged"))] == ["03-shift"]
    assert "ledger.json" not in {path.name for path in out.iterdir()}
    assert set(jobs.summary(out)["figures"]["loss"]) == {
        *("average", "forgetting", "backward_transfer", "forward_transfer")
    }


def test_overlapping_by_choice_and_with_a_pull(ranks, world: Path, tmp_path: Path) -> None:
    """A second task may overwrite the first one's entries, a third may not; both are pulled to what the earlier ones
    need. Every stage is scored as the model that it trained."""
    out, pool = tmp_path / "out", ranks(2)
    entries = [
        tasks.task(world, "copy"),
        tasks.task(world, "sort", disjoint=False),
        tasks.task(world, "shift", pull=30),
    ]
    made = tasks.content(world, entries, pull=10, importance_batches=2, max_steps=4)
    path = tasks.write(tmp_path / "tasks.yaml", made)
    run(pool, path, "--output_dir", str(out))
    state = read_state(out)
    first, second, third = (Ticket.load(out / task.folder / "ticket") for task in state.tasks)
    assert first.mask.overlap(second.mask) == state.tasks[1].num_shared > 0
    assert third.mask.overlap(first.mask) == third.mask.overlap(second.mask) == state.tasks[2].num_shared == 0
    told = json.loads((out / "ledger.json").read_text(encoding="utf-8"))
    assert told["eligible"] == told["free"] + sum(task["num_owned"] for task in told["tasks"])
    assert told["tasks"][0]["num_owned"] == first.num_active - state.tasks[1].num_shared
    for number, (task, asked) in enumerate(zip(state.tasks, (None, 10, 30))):
        training = jobs.summary(out / task.folder)["training"]
        before, after = state.stages[number].scores[task.name], state.stages[number + 1].scores[task.name]
        assert before["loss"] == pytest.approx(training["eval_loss_before"], rel=1e-5)
        assert after["loss"] == pytest.approx(training["eval_loss"], rel=1e-5)
        assert training["report"].get("pull", {}).get("asked") == asked
        options = yaml.safe_load((out / task.folder / "config.yaml").read_text(encoding="utf-8"))
        earlier = [str(out / other.folder / "ticket") for other in state.tasks[:number]]
        assert options.get("retain") == options.get("tickets") == (earlier or None)
        assert (out / task.folder / "ticket" / "importance.safetensors").is_file()

    (out / "01-copy" / "ticket" / "importance.safetensors").unlink()
    more = tasks.write(tmp_path / "more.yaml", made | {"tasks": [*entries, tasks.task(world, "rotate")]})
    line = errors(pool, more, "--output_dir", str(out))
    assert "task rotate has a pull to what copy needs, which was not kept" in line


def test_the_options_of_a_later_stage(world: Path, tmp_path: Path) -> None:
    """What a sequence adds to the options of a task: only what it needs."""
    folder = tmp_path / "out"
    state = folders.make(world, folder, {"copy": range(2), "sort": range(2, 4)})
    earlier = [str(folder / name / "ticket") for name in ("01-copy", "02-sort")]
    Mask.from_dense({"a": torch.ones(2, 2, dtype=torch.bool)}).save(tmp_path / "mine")

    def options(entry: dict[str, Any], **common: Any) -> dict[str, Any]:
        names = [tasks.task(world, name) for name in ("copy", "sort")]
        made = tasks.content(world, [*names, tasks.task(world, "shift", **entry)], output_dir=str(folder), **common)
        found = read([tasks.write(tmp_path / "tasks.yaml", made)])
        state.tasks[2:] = [TaskState("shift", "03-shift", {}, True, True)]
        return stage_options(found, found.tasks[2], state, folder)

    plain = options({})
    assert plain["tickets"] == earlier and plain["output_dir"] == str(folder / "03-shift")
    unused = {"retain", "pull", "keep_importance", "resume_from_checkpoint", "merged", "disjoint", "protect", "overlap"}
    assert not unused & plain.keys()
    assert plain["model_name_or_path"] == str(world / "base") and plain["train_file"].endswith("shift_train.jsonl")
    assert options({"protect": [str(tmp_path / "mine")]})["protect"] == [str(tmp_path / "mine")]
    overlapping = options({"disjoint": False})
    assert overlapping["tickets"] == earlier and overlapping["overlap"] is True
    tickets = [folder / name / "ticket" for name in ("01-copy", "02-sort")]
    shared = "task shift: its mask shares .* entries with sort: give another mask, or let it overlap"
    with pytest.raises(ValueError, match=shared):
        options({"mask": str(tickets[1])})
    assert "overlap" not in options({"mask": str(tmp_path / "mine")})
    assert options({"mask": str(tickets[1]), "disjoint": False})["tickets"] == earlier

    pulled = options({"retain": "[general]"}, pull=3)
    assert pulled["retain"] == ["general", *earlier] and pulled["pull"] == 3 and pulled["keep_importance"] is True
    assert options({"retain": "general"})["retain"] == ["general"], "a pull of the run's own"
    alone = options({"pull": 0, "retain": ["general"]}, pull=3)
    assert not {"pull", "retain"} & alone.keys() and alone["keep_importance"] is True
    assert not {"pull", "retain", "keep_importance"} & options({}, pull=3, retain_earlier=False).keys()

    state.tasks[0].is_removed = True
    assert options({})["tickets"] == earlier[1:]
    state.tasks[0].is_removed = False
    full = options({}, method="full", model_revision="main")
    assert full["model_name_or_path"] == str(folder / "02-sort" / "merged") and full["merged"] is True
    assert not {"tickets", "protect", "model_revision"} & full.keys()

"""A configuration becomes what was meant, or is refused in a line that names the task and the cure, before anything
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lota.data.options import plan_data
from lota.evaluate.rows import has_rows
from lota.sequence.checks import parse_task, prepare
from lota.sequence.config import SequenceConfig, folder_named, read
from lota.ticket import Mask
from tests.sequence import tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.make_world(tmp_path_factory.mktemp("world"))


def read_file(
    world: Path, tmp_path: Path, entries: list[dict[str, Any]], *words: str, **changes: Any
) -> SequenceConfig:
    path = tasks.write(
        tmp_path / "tasks.yaml", tasks.content(world, entries, output_dir=str(tmp_path / "out"), **changes)
    )
    return read([path, *words])


def test_a_task_has_the_options_of_all_unless_it_has_its_own(world: Path, tmp_path: Path) -> None:
    entries = [tasks.task(world, "copy"), tasks.task(world, "sort", density=0.3, disjoint=False)]
    found = read_file(world, tmp_path, entries, eval_rows_limit=9)
    first, second = found.tasks
    assert (first.name, first.options["density"], first.disjoint, first.pull) == ("copy", 0.15, True, None)
    assert (second.name, second.options["density"], second.disjoint) == ("sort", 0.3, False)
    assert first.options["train_file"] == str(world / "copy_train.jsonl")
    assert not {"tasks", "name", "output_dir", "eval_rows_limit", "keep_models", "disjoint"} & {*first.options}
    assert found.is_sparse and found.output_dir == tmp_path / "out" and found.eval_rows_limit == 9


def test_the_command_line_wins_over_the_tasks_own_and_the_file_that_is_written_says_the_same(
    world: Path, tmp_path: Path
) -> None:
    entries = [tasks.task(world, "copy", learning_rate=5e-2), tasks.task(world, "sort")]
    words = ["--learning_rate", "1e-3", "--max_steps=4", "--disjoint", "false", "--output_dir", str(tmp_path / "new")]
    found = read_file(world, tmp_path, entries, *words, "--resume_from_checkpoint", "true", "--bf16", "true")
    assert [task.options["learning_rate"] for task in found.tasks] == [1e-3, 1e-3]
    assert [(task.options["max_steps"], task.disjoint, task.options["bf16"]) for task in found.tasks] == [
        (4, False, True)
    ] * 2
    assert found.output_dir == tmp_path / "new" and "resume_from_checkpoint" not in found.tasks[0].options
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text(yaml.safe_dump(dict(found.content)), encoding="utf-8")
    again = read([str(tmp_path / "new")])
    assert (again.tasks, again.output_dir) == (found.tasks, found.output_dir)
    assert read(["--local_rank=0", "--config", str(tmp_path / "new")]).tasks == found.tasks
    assert folder_named([str(tmp_path / "new")]) == folder_named([str(tmp_path / "new" / "config.yaml")])


REFUSED: list[tuple[dict[str, Any], list[str], str]] = [
    ({"learning_rat": 1}, [], "unknown option 'learning_rat'. Did you mean 'learning_rate'?"),
    ({"tasks": []}, [], "tasks must be a list of tasks"),
    ({"tasks": ["sql"]}, [], "tasks, entry 1 must hold a name and options"),
    ({"tasks": [{"name": "a", "densty": 0.1}]}, [], "task a: unknown option 'densty'. Did you mean 'density'?"),
    ({"tasks": [{"name": "a", "method": "full"}]}, [], "task a: method is the same for all tasks"),
    ({"tasks": [{"name": "a", "eval_rows_limit": 3}]}, [], "task a: eval_rows_limit is the same for all tasks"),
    ({"tasks": [{"name": "a", "resume_from_checkpoint": "x"}]}, [], "task a: a sequence resumes by itself"),
    ({"tasks": [{"density": 0.1}]}, [], "tasks, entry 1: name: give it a name"),
    ({"tasks": [{"name": False}]}, [], "tasks, entry 1: name: expected text, got False"),
    ({"tasks": [{"name": "a/b"}]}, [], "tasks, entry 1: name 'a/b' cannot be a folder's"),
    ({"tasks": [{"name": "base"}]}, [], "tasks, entry 1: name 'base' cannot be a folder's"),
    ({"tasks": [{"name": "a"}, {"name": "a"}]}, [], "tasks, entry 2: there is a task a already"),
    ({"tasks": [{"name": "a", "dense": ["*"]}]}, [], "task a: dense trains tensors whole"),
    ({"tasks": [{"name": "a", "disjoint": "no"}]}, [], "disjoint must be true or false, got 'no'"),
    ({"tasks": [{"name": c} for c in "abc"], "density": 0.4}, [], "task c: disjoint tasks cannot have more than all"),
    ({"eval_rows_limit": 0}, [], "eval_rows_limit must be an integer of at least 1"),
    ({"method": "lorra"}, [], "method must be one of lota, full, lora, got 'lorra'. Did you mean 'lora'?"),
    ({"resume_from_checkpoint": "runs/checkpoint-3"}, [], "a sequence resumes from the newest checkpoint by itself"),
    ({"output_dir": None}, [], "output_dir is missing"),
    ({}, ["--densty", "0.1"], "unknown option 'densty'"),
    ({}, ["--tasks", "a"], "tasks is a list, which only the file can hold"),
    ({}, ["--method", "full", "--disjoint", "false"], "method: full does not use disjoint"),
    ({}, ["--keep_models", "true"], "method: lota does not use keep_models"),
]


@pytest.mark.parametrize(("changes", "words", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refusals(world: Path, tmp_path: Path, changes: dict[str, Any], words: list[str], message: str) -> None:
    usual = tasks.content(world, [tasks.task(world, "copy")], output_dir=str(tmp_path / "out"))
    made = {name: value for name, value in (usual | changes).items() if value is not None}
    with pytest.raises(ValueError) as caught:
        read([tasks.write(tmp_path / "tasks.yaml", made), *words])
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_pull_of_a_task(world: Path, tmp_path: Path) -> None:
    """It is no option of the rivals, and 0 is none."""
    entries = [tasks.task(world, "copy"), tasks.task(world, "sort", pull=3), tasks.task(world, "shift", pull=0)]
    found = read_file(world, tmp_path, entries, pull="1e1").tasks
    assert [task.pull for task in found] == [10, 3, 0] and [task.keeps_old for task in found] == [True, True, False]
    assert not any("pull" in task.options for task in found)
    alone = read_file(world, tmp_path, entries, "--retain_earlier", "false", pull=10).tasks
    assert not any(task.keeps_old for task in alone) and alone[0].pull == 10
    assert read_file(world, tmp_path, entries, pull=10, method="full").tasks[0].pull is None
    with pytest.raises(ValueError, match="task a: pull must be a number above 0"):
        read_file(world, tmp_path, [{"name": "a", "pull": "much"}])


def test_tasks_with_masks_of_their_own_or_overlap_may_have_more_than_all(world: Path, tmp_path: Path) -> None:
    entries = [{"name": name, "density": 0.9, "disjoint": name == "a"} for name in "abc"]
    assert len(read_file(world, tmp_path, entries).tasks) == 3


def test_what_names_no_configuration_is_refused(tmp_path: Path) -> None:
    for words in ([], ["--config"], [str(tmp_path / "none.yaml")]):
        with pytest.raises(ValueError, match=r"name the sequence's YAML file, or its folder"):
            read(words)
    with pytest.raises(ValueError, match=r"is no folder of a sequence: it has no config\.yaml"):
        read([str(tmp_path)])
    (tmp_path / "odd.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="is not YAML"):
        read([str(tmp_path / "odd.yaml")])


def test_every_task_is_looked_at_before_the_first_is_trained(world: Path, tmp_path: Path) -> None:
    good = tasks.task(world, "copy")
    Mask.from_dense({"a.weight": torch.ones(4, 4, dtype=torch.bool)}).save(tmp_path / "mask")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"train_file": str(world / "none.jsonl")}, "task sort: no such file"),
        ({"eval_file": None}, "task sort: after every task all tasks are scored, and this one has no evaluation rows"),
        ({"learning_rate": 0.0}, "task sort: learning_rate must be above 0"),
        ({"prompt_field": "question"}, "task sort: .*question"),
        ({"optim": "adafactor"}, "task sort: optimizer Adafactor is not element-wise"),
        ({"score": "gradiant"}, "task sort: score must be one of"),
        ({"mask": str(tmp_path / "nothing")}, "task sort: "),
    ]
    for changes, message in cases:
        entry = {name: value for name, value in tasks.task(world, "sort", **changes).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            prepare(read_file(world, tmp_path, [good, entry]), [])
    same = {"mask": str(tmp_path / "mask")}
    both = [good | same, tasks.task(world, "sort", **same)]
    with pytest.raises(ValueError, match="task sort: its mask shares 16 entries with that of copy"):
        prepare(read_file(world, tmp_path, both), [])
    base, found = prepare(read_file(world, tmp_path, [good], eval_rows_limit=5), [])
    assert base.model == str(world / "base") and base.settings()["model_revision"] == "main"
    (task,) = found
    assert len(task.rows) == 5 and task.dtype == "float32" and task.batch_rows == 22
    assert task.options["density"] == 0.15 and not (tmp_path / "out").exists()


CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"


@pytest.mark.parametrize("name", ["sequence_small", "sequence_llama31_8b"])
def test_the_configurations_that_come_along_are_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tasks are parsed and checked as runs are, and no option of them is left unused."""
    monkeypatch.chdir(CONFIGS.parents[1])
    words = ["--output_dir", "runs/new", "--model_name_or_path", "runs/small"]
    found = read([str(CONFIGS / f"{name}.yaml"), *(words if name == "sequence_small" else words[:2])])
    for task in found.tasks:
        args, config, options = parse_task(found, task)
        assert options.notes == () and options.calibration is not None and options.calibration.density <= 0.15
        assert has_rows(args) and plan_data(args).parts
        if name == "sequence_llama31_8b":
            assert config.per_device_train_batch_size * config.gradient_accumulation_steps * 8 == 32


def test_the_large_ones_tasks_are_those_of_the_single_files() -> None:
    found = read([str(CONFIGS / "sequence_llama31_8b.yaml"), "--output_dir", "runs/new"])
    for task in found.tasks:
        single = yaml.safe_load((CONFIGS / f"llama31_8b_{task.name}.yaml").read_text(encoding="utf-8"))
        assert task.options == single, task.name


def test_an_option_that_a_method_does_not_use_is_refused_on_the_command_line_and_left_out_of_a_file(
    world: Path, tmp_path: Path
) -> None:
    entries = [tasks.task(world, "copy")]
    with pytest.raises(ValueError, match=r"task copy: method: full trains every weight, so density would be ignored"):
        prepare(read_file(world, tmp_path, entries, "--method", "full", "--density", "0.3"), [])
    _, (task,) = prepare(read_file(world, tmp_path, entries, "--method", "full"), [])
    assert "density" not in task.options

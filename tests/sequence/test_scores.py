"""Figures of a stage are those of its model merged into a folder and loaded afresh, and none is computed twice."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lota.data.tokenizer import load_tokenizer
from lota.evaluate.generate import Decoding
from lota.evaluate.scoring import RowSettings, score_rows
from lota.sequence.checks import Base, Prepared, prepare
from lota.sequence.config import read
from lota.sequence.scores import fill_in
from lota.sequence.state import Stage, State
from lota.ticket import Ticket
from tests.sequence import folders, tasks
from tests.sequence.test_remove import DISJOINT, OVERLAPPING


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.make_world(tmp_path_factory.mktemp("world"))


def prepared(world: Path, tmp_path: Path, *names: str) -> tuple[Base, list[Prepared]]:
    entries = [tasks.task(world, name) for name in names]
    path = tasks.write(tmp_path / "tasks.yaml", tasks.content(world, entries, output_dir=str(tmp_path / "none")))
    return prepare(read([path]), names)


def fresh(world: Path, tmp_path: Path, state: State, folder: Path, stage: Stage, task: Prepared) -> dict[str, float]:
    """The figures of a stage's model, made without any of the code that is tested."""
    weights = load_file(world / "base" / "model.safetensors")
    for name in stage.tasks:
        entry = state.task(name)
        assert entry is not None
        weights = folders.put_on(weights, Ticket.load(folder / state.place_of(entry) / "ticket"))
    merged = tmp_path / f"merged{len(list(tmp_path.iterdir()))}"
    merged.mkdir()
    for path in (world / "base").iterdir():
        if path.suffix == ".json":
            (merged / path.name).write_bytes(path.read_bytes())
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(merged).eval()
    how = RowSettings(("loss",), Decoding(), task.batch_rows)
    return score_rows(model, load_tokenizer(str(merged)), task.rows, how, "fresh")


@pytest.mark.parametrize("entries", [DISJOINT, OVERLAPPING], ids=["disjoint", "overlapping"])
def test_every_stage_scores_as_its_merged_model(world: Path, tmp_path: Path, entries: dict[str, range]) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, entries)
    if entries is DISJOINT:  # a model that is no extension of the one before it
        state.tasks[1].is_removed = True
        (folder / "removed").mkdir()
        (folder / "02-reverse").rename(folder / "removed" / "02-reverse")
        state.stages.append(Stage("without reverse", "", ("copy", "rotate", "sort")))
    base, found = prepared(world, tmp_path, "copy", "shift")
    writes: list[int] = []
    fill_in(state, folder, base, found, lambda: writes.append(sum(len(stage.scores) for stage in state.stages)))
    assert writes == list(range(1, 2 * len(state.stages) + 1))
    for stage in state.stages:
        for task in found:
            assert stage.scores[task.name] == fresh(world, tmp_path, state, folder, stage, task), (
                stage.after,
                task.name,
            )
    losses = [stage.scores["copy"]["loss"] for stage in state.stages]
    assert len(set(losses)) == len(losses), "every stage is a model of its own"

    known = copy.deepcopy(state.stages)
    base, found = prepared(world, tmp_path, "copy", "shift", "sort")
    del state.stages[1].scores["copy"]
    writes.clear()
    fill_in(state, folder, base, found, lambda: writes.append(1))
    assert len(writes) == len(state.stages) + 1  # the task that is new, and the figure that was lost
    for before, after in zip(known, state.stages):
        assert {name: after.scores[name] for name in before.scores} == before.scores and "sort" in after.scores
    fill_in(state, folder, base, found, lambda: writes.append(1))
    assert len(writes) == len(state.stages) + 1


def test_another_base_than_the_tickets_is_refused(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, DISJOINT)
    other = tasks.make_world(tmp_path)
    weights = load_file(other / "base" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "base" / "model.safetensors", metadata={"format": "pt"})
    base, found = prepared(other, tmp_path, "copy")
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        fill_in(state, folder, base, found, lambda: None)
    assert [list(stage.scores) for stage in state.stages] == [["copy"], [], [], [], []]


def test_a_row_that_the_model_has_no_place_for_names_the_task(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, {})
    base, (task,) = prepared(world, tmp_path, "copy")
    long = Prepared(**(task.__dict__ | {"rows": [*task.rows, {"prompt": "a " * 3000, "completion": "b"}]}))
    with pytest.raises(ValueError, match=r"task copy, evaluation row 23 needs 300\d tokens"):
        fill_in(state, folder, base, [long], lambda: None)


def test_models_of_the_rivals_that_were_not_kept_are_passed_over(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, {"copy": range(2), "sort": range(2, 4)}, method="full")
    weights = folders.put_on(
        load_file(world / "base" / "model.safetensors"), Ticket.load(folder / "02-sort" / "ticket")
    )
    merged = folder / "02-sort" / "merged"
    merged.mkdir()
    for path in (world / "base").iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    base, found = prepared(world, tmp_path, "copy")
    fill_in(state, folder, base, found, lambda: None)
    assert [list(stage.scores) for stage in state.stages] == [["copy"], [], ["copy"]]
    only_sort = Stage("", "", ("sort",))
    expected = fresh(world, tmp_path, State("lota", {}, tasks=state.tasks), folder, only_sort, found[0])
    assert state.stages[2].scores["copy"] == expected

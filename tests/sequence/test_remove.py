"""A task comes out exactly: the model of the others is the base with their very values, and their files keep every
byte. What cannot be taken out exactly is refused, and nothing is changed then."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lota.delivery.apply import apply_to_checkpoint
from lota.files import only_writer
from lota.sequence.run import main
from lota.sequence.state import read_state
from lota.ticket import Ticket
from tests.sequence import folders, tasks

DISJOINT = {"copy": range(2), "reverse": range(2, 4), "rotate": range(4, 7), "sort": range(8, 10)}
OVERLAPPING = {"copy": range(4), "reverse": range(2, 6), "rotate": range(8, 10)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.make_world(tmp_path_factory.mktemp("world"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_task_in_the_middle_comes_out_exactly(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    folders.make(world, folder, DISJOINT)
    before = contents(folder)
    main([str(folder), "--remove", "rotate"])
    out = capsys.readouterr().out
    assert "the 3 other tickets share no entry, and each is of the base alone" in out
    after = contents(folder)
    for name, data in before.items():
        if name.startswith(("01-", "02-", "04-")):
            assert after[name] == data, name
        if name.startswith("03-"):
            assert after[f"removed/{name}"] == data and name not in after
    assert not (folder / "03-rotate").exists() and not (folder / "summary.json").exists()
    state = read_state(folder)
    assert [task.name for task in state.on_model] == ["copy", "reverse", "sort"]
    assert (state.stages[-1].after, state.stages[-1].tasks) == ("without rotate", ("copy", "reverse", "sort"))
    told = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    assert [task["name"] for task in told["tasks"]] == ["copy", "reverse", "sort"]
    assert told["eligible"] == told["free"] + sum(task["num_owned"] for task in told["tasks"])
    names = [task["name"] for task in yaml.safe_load((folder / "config.yaml").read_text())["tasks"]]
    assert names == ["copy", "reverse", "sort"]

    # The command that was printed gives the base with the others' values, and every other entry is the base's.
    command = next(line for line in out.splitlines() if "lota apply" in line).split()
    paths = command[command.index("--base") + 2 : command.index("--out")]
    apply_to_checkpoint(world / "base", [Ticket.load(path) for path in paths], tmp_path / "merged")
    expected = load_file(world / "base" / "model.safetensors")
    for path in ("01-copy", "02-reverse", "04-sort"):
        expected = folders.put_on(expected, Ticket.load(folder / path / "ticket"))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    with pytest.raises(ValueError, match="no task 'rotate' here: there are copy, reverse, sort"):
        main([str(folder), "--remove", "rotate"])
    for name in ("copy", "sort", "reverse"):
        main([str(folder), "--remove", name])
    assert read_state(folder).on_model == [] and len(list((folder / "removed").iterdir())) == 4


def test_of_overlapping_tasks_the_later_one_comes_out_first(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, OVERLAPPING)
    assert [task.num_shared > 0 for task in state.tasks] == [False, True, False]
    before = contents(folder)
    with pytest.raises(
        ValueError, match=r"copy cannot be removed exactly: reverse, trained later, .* Remove reverse first"
    ):
        main([str(folder), "--remove", "copy"])
    assert contents(folder) == before
    # The last may share what it wants, and no ticket after reverse was made for a base with it.
    main([str(folder), "--remove", "reverse"])
    assert [task.name for task in read_state(folder).on_model] == ["copy", "rotate"]
    tickets = [Ticket.load(folder / name / "ticket") for name in ("01-copy", "03-rotate")]
    apply_to_checkpoint(world / "base", tickets, tmp_path / "merged")
    main([str(folder), "--remove", "copy"])
    assert [task.name for task in read_state(folder).on_model] == ["rotate"]


def test_a_removal_that_was_killed_is_finished(world: Path, tmp_path: Path) -> None:
    """sequence.json is written before the folder is moved."""
    folder = tmp_path / "out"
    state = folders.make(world, folder, DISJOINT)
    state.tasks[0].is_removed = True
    state.write(folder)
    main([str(folder), "--remove", "sort"])
    assert {path.name for path in (folder / "removed").iterdir()} == {"01-copy", "04-sort"}
    assert not (folder / "01-copy").exists()


def test_refusals_leave_everything(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, DISJOINT)
    before = contents(folder)

    def refused(message: str, *words: str) -> None:
        with pytest.raises(ValueError, match=message):
            main([str(folder), *words])
        assert contents(folder) == before

    refused("no task '' here", "--remove")
    refused("no task 'copi' here: there are copy, reverse, rotate, sort. Did you mean 'copy'", "--remove", "copi")
    refused("expected nothing but the sequence, got '--density 0.1'", "--remove", "copy", "--density", "0.1")
    with only_writer(folder, "trains a sequence in"):
        refused("trains a sequence in .* now", "--remove", "copy")
    with pytest.raises(ValueError, match="is no folder of a sequence"):
        main([str(world), "--remove", "copy"])

    # Another base under the same name: the others are not proved, so nothing is removed.
    shutil.copytree(world / "base", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    state.settings["model_name_or_path"] = str(tmp_path / "base")
    state.write(folder)
    before = contents(folder)
    refused(r"the other tickets are not of the base alone: model\.layers\.0\.mlp\.up_proj", "--remove", "copy")
    state.settings["model_name_or_path"] = str(world / "base")

    state.tasks[-1].is_complete = False
    state.write(folder)
    before = contents(folder)
    refused("task sort is being trained on top of the others: finish it first", "--remove", "copy")
    state.tasks[-1].is_complete, state.method = True, "full"
    state.write(folder)
    before = contents(folder)
    refused("a task of method: full cannot be removed", "--remove", "copy")


def test_a_base_that_is_not_at_hand_is_said(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    state = folders.make(world, folder, DISJOINT)
    state.settings["model_name_or_path"] = str(tmp_path / "gone")
    state.write(folder)
    main([str(folder), "--remove", "copy"])
    assert "the 3 other tickets are sound and share no entry; the base is not at hand" in capsys.readouterr().out

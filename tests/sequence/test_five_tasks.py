"""Five tasks in sequence on a small model: masks are pairwise disjoint, the ledger adds up, the third task comes out
exactly with the others bit-equal at their entries, and the forgetting is shown beside the rivals'."""

from __future__ import annotations

import csv
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lota.cli import main as cli
from lota.delivery.apply import apply_to_checkpoint
from lota.sequence.run import main
from lota.sequence.state import State, read_state
from lota.ticket import Ticket
from tests.sequence import tasks
from tests.train import jobs

FOLDERS = [f"{number:02d}-{name}" for number, name in enumerate(tasks.TASKS, start=1)]
OWN: dict[str, dict[str, Any]] = {"reverse": {"density": 0.2, "score": "fisher"}, "rotate": {"learning_rate": 2e-2}}


def run(pool: Any, *argv: str) -> None:
    pool.run(jobs.run_recipe, "train_sequence", list(argv), timeout=900)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tasks.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def five(ranks, world: Path) -> Path:
    """Five tasks, each with its own data, two with a density, score or rate of their own; on two ranks."""
    entries = [tasks.task(world, name, **OWN.get(name, {})) for name in tasks.TASKS]
    path = tasks.write(world / "five.yaml", tasks.content(world, entries))
    run(ranks(2), path, "--output_dir", str(world / "five"))
    return world / "five"


def tickets(folder: Path) -> dict[str, Ticket]:
    return {name: Ticket.load(folder / name / "ticket") for name in FOLDERS if (folder / name).is_dir()}


def merged(world: Path, chosen: list[Ticket], out: Path) -> dict[str, Tensor]:
    """The weights of the plain base with these tickets, as `lota apply` writes them."""
    apply_to_checkpoint(world / "base", chosen, out)
    return load_file(out / "model.safetensors")


def assert_is_base_with(weights: dict[str, Tensor], world: Path, chosen: list[Ticket]) -> None:
    """Every entry of the tickets has its value, and every other entry the base's bits."""
    base = load_file(world / "base" / "model.safetensors")
    assert weights.keys() == base.keys()
    for name, tensor in weights.items():
        outside = torch.ones(tensor.shape, dtype=torch.bool)
        for ticket in chosen:
            if name in ticket.names:
                inside = ticket.mask.dense(name)
                assert torch.equal(tensor[inside], ticket.values(name)), name
                outside &= ~inside
        assert torch.equal(tensor[outside], base[name][outside]), name


def test_masks_are_disjoint_and_the_ledger_adds_up(five: Path) -> None:
    found = list(tickets(five).values())
    assert len(found) == 5
    for one, other in combinations(found, 2):
        assert one.mask.overlap(other.mask) == 0
    told = json.loads((five / "ledger.json").read_text(encoding="utf-8"))
    eligible = found[0].mask.eligible
    densities = [0.15, 0.2, 0.15, 0.15, 0.15]
    assert [task["num_active"] for task in told["tasks"]] == [round(density * eligible) for density in densities]
    assert [task["num_owned"] for task in told["tasks"]] == [ticket.num_active for ticket in found]
    assert [task["num_shared"] for task in told["tasks"]] == [0] * 5
    assert told["eligible"] == eligible and told["free"] == eligible - sum(ticket.num_active for ticket in found)
    for shares in (told["layers"], told["tensors"]):
        assert all(share["eligible"] == share["free"] + sum(share["owned"].values()) for share in shares.values())
        assert sum(share["free"] for share in shares.values()) == told["free"]
    for name, share in told["tensors"].items():
        assert [*share["owned"].values()] == [ticket.mask.active(name) for ticket in found]
    assert all(task["num_changed"] == ticket.num_changed > 0 for task, ticket in zip(told["tasks"], found))


def test_every_ticket_is_of_the_plain_base_and_any_of_them_go_on_it(world: Path, five: Path, tmp_path: Path) -> None:
    found = list(tickets(five).values())
    for number, chosen in enumerate(([0], [4], [1, 3], [4, 0, 2], [0, 1, 2, 3, 4])):
        some = [found[place] for place in chosen]
        assert_is_base_with(merged(world, some, tmp_path / str(number)), world, some)


def test_all_tasks_are_scored_after_every_task(five: Path) -> None:
    rows = list(csv.DictReader((five / "matrix.csv").open(encoding="utf-8")))
    names = list(tasks.TASKS)
    assert [(row["after"], row["task"]) for row in rows] == [(s, t) for s in ("base", *names) for t in names]
    loss = {(row["after"], row["task"]): float(row["loss"]) for row in rows}
    for place, name in enumerate(names):
        before = "base" if place == 0 else names[place - 1]
        training = jobs.summary(five / FOLDERS[place])["training"]
        # A stage begins with the model that the one before it left, and leaves the one that is scored next.
        assert loss[before, name] == pytest.approx(training["eval_loss_before"], rel=1e-5)
        assert loss[name, name] == pytest.approx(training["eval_loss"], rel=1e-5)
        assert loss[name, name] < loss[before, name]
    assert (five / "matrix.png").read_bytes().startswith(b"\x89PNG")
    figures = jobs.summary(five)["figures"]["loss"]
    expected = sum(loss["sort", name] - loss[name, name] for name in names[:-1]) / 4
    assert figures["backward_transfer"] == pytest.approx(-expected)


def test_the_third_task_comes_out_exactly(
    ranks, world: Path, five: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "five"
    folder.mkdir()
    for path in sorted(five.rglob("*")):
        place = folder / path.relative_to(five)
        place.mkdir() if path.is_dir() else place.write_bytes(path.read_bytes())
    before = {path: path.read_bytes() for path in folder.glob("0[1245]-*/ticket/*")}
    all_five = merged(world, list(tickets(folder).values()), tmp_path / "all")
    main([str(folder), "--remove", "rotate"])
    assert "each is of the base alone, by its fingerprints" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.glob("*/ticket/*")} == before
    others = list(tickets(folder).values())
    assert len(others) == 4
    without = merged(world, others, tmp_path / "without")
    assert_is_base_with(without, world, others)
    for ticket in others:  # bit for bit what they were while the third was on the model
        for name in ticket.names:
            inside = ticket.mask.dense(name)
            assert torch.equal(without[name][inside], all_five[name][inside]), name

    run(ranks(2), str(folder))  # and what is left is scored
    state = read_state(folder)
    assert (state.stages[-1].after, set(state.stages[-1].scores)) == ("without rotate", {*tasks.TASKS} - {"rotate"})
    assert jobs.summary(folder)["removed"] == ["rotate"]
    told = json.loads((folder / "ledger.json").read_text(encoding="utf-8"))
    assert told["free"] == told["eligible"] - sum(ticket.num_active for ticket in others)


@pytest.mark.slow
def test_forgetting_stands_beside_the_rivals(
    ranks, world: Path, five: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(five)]
    for method in ("full", "lora"):
        folders.append(str(tmp_path / method))
        run(ranks(2), str(world / "five.yaml"), "--output_dir", folders[-1], "--method", method, "--max_steps", "3")
    assert cli(["matrix", *folders, "--plot", str(tmp_path / "methods.png")]) == 0
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    assert cli(["matrix", *folders, "--json"]) == 0
    out = capsys.readouterr().out
    told = json.loads(out[out.rindex("\n{\n") :])
    states: list[State] = [read_state(Path(folder)) for folder in folders]
    for folder, state in zip(folders, states):
        assert [stage.after for stage in state.stages] == ["base", *tasks.TASKS]
        assert all(set(stage.scores) == {*tasks.TASKS} for stage in state.stages)
        for metric in ("loss", "exact_tokens"):
            assert None not in told[folder]["figures"][metric].values()
    assert states[0].stages[0].scores == states[1].stages[0].scores == states[2].stages[0].scores  # one base, same rows

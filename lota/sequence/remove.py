"""Takes a task out of a sequence again, exactly: its ticket is put aside, and the others are proved to be whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lota.algebra import ModelTensors, verify
from lota.delivery.model_folder import locate
from lota.files import only_writer
from lota.ranks.world import print_once, world_size
from lota.sequence import books
from lota.sequence.config import folder_named
from lota.sequence.ledger import find_task
from lota.sequence.state import Stage, State, read_state
from lota.ticket import Ticket


def remove(argv: Sequence[str]) -> None:
    """`FOLDER --remove NAME`. ValueError where the task cannot be taken out exactly; nothing is changed then."""
    if world_size() > 1:
        raise ValueError("--remove works in one process: start it without a launcher")
    words = list(argv)
    place = words.index("--remove")
    name = "".join(words[place + 1 : place + 2])
    del words[place : place + 2]
    folder = folder_named(words)
    read_state(folder)  # which refuses a folder without one
    with only_writer(folder.absolute(), "trains a sequence in"):
        state = books.open_state(folder)
        assert state is not None
        _remove(state, folder, name)


def _remove(state: State, folder: Path, name: str) -> None:
    if state.method != "lota":
        raise ValueError(
            f"a task of method: {state.method} cannot be removed: its changes are spread over weights that later tasks "
            "moved, too. Only tickets come out exactly"
        )
    begun = [task.name for task in state.tasks if not task.is_complete]
    if begun:
        raise ValueError(
            f"task {begun[0]} is being trained on top of the others: finish it first, or remove its folder"
        )
    tasks = state.on_model
    number = find_task(name, [task.name for task in tasks])
    later = [task.name for task in tasks[number + 1 :] if task.num_shared]
    if later:
        raise ValueError(
            f"{name} cannot be removed exactly: {later[0]}, trained later, shares entries with earlier tasks, so its "
            f"ticket is for a base with those on it. Remove {later[-1]} first"
        )
    paths = books.ticket_paths(state, folder)
    del paths[name]
    before = {path: _digest(path) for path in paths.values()}
    print_once(_proved(state, list(paths.values()), any(task.num_shared for task in tasks if task.name != name)))
    tasks[number].is_removed = True
    state.stages.append(Stage(f"without {name}", "", tuple(paths)))
    books.begin_again(folder)
    books.forget_task(folder, name)
    state.write(folder)  # from here on the task is out, whatever happens
    books.put_aside(state, folder)
    books.write_matrix(state, folder)
    books.write_ledger(state, books.ledger_of(state, folder), folder)
    assert before == {path: _digest(path) for path in paths.values()}, "the other tickets' files changed"
    print_once(
        f"{name} is out, in {folder / state.removed_folder(tasks[number])}; the other tickets have the same bytes"
    )
    if paths:
        base = state.settings["model_name_or_path"]
        print_once(f"the model now: lota apply --base {base} {' '.join(map(str, paths.values()))} --out MODEL")
        print_once(f"its scores: lota sequence {folder}")


def _proved(state: State, paths: Sequence[Path], is_overlapping: bool) -> str:
    """What was proved of the tickets that stay, after reading all of them; ValueError where one is not sound."""
    tickets = [Ticket.load(path) for path in paths]
    if is_overlapping:
        for ticket in tickets:
            ticket.verify()
        return f"the files of the {len(tickets)} other tickets are sound"
    try:
        found = locate(state.settings["model_name_or_path"], state.settings["model_revision"])
    except (ValueError, OSError) as error:
        verify(tickets)
        return f"the {len(tickets)} other tickets are sound and share no entry; the base is not at hand ({error})"
    dtype = getattr(torch, state.settings["dtype"])
    verdict = verify(tickets, base=_Cast(found, dtype, state.settings["trust_remote_code"]))
    if not verdict.is_proved:
        raise ValueError(f"the other tickets are not of the base alone: {verdict.problems[0]}")
    return f"the {len(tickets)} other tickets share no entry, and each is of the base alone, by its fingerprints"


class _Cast(ModelTensors):
    """A base as it is trained: in the dtype that the runs load it in."""

    def __init__(self, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> None:
        super().__init__(folder, trust_remote_code=trust_remote_code)
        self._dtype = dtype

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def _digest(ticket: Path) -> dict[str, str]:
    """sha256 of every file of a ticket."""
    return {path.name: _sha256(path) for path in sorted(ticket.iterdir()) if path.is_file()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()

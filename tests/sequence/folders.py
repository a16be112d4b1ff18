"""The folder of a sequence as training would have left it, made of tickets that were made without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from safetensors.torch import load_file
from torch import Tensor

from lota.sequence.books import ledger_of, write_ledger
from lota.sequence.state import Stage, State, TaskState
from lota.ticket import Ticket
from tests.sequence import tasks


def make(world: Path, folder: Path, entries: Mapping[str, range], method: str = "lota") -> State:
    """A sequence of tasks with these entries (see `tasks.make_ticket`); a ticket that shares some with earlier ones is
    made for the base with those on it, as training does it."""
    settings = {
        "model_name_or_path": str(world / "base"),
        "model_revision": "main",
        "trust_remote_code": False,
        "attn_implementation": None,
        "dtype": "float32",
        "eval_rows_limit": 256,
    }
    state = State(method, settings, stages=[Stage("base", "", ())])
    on = load_file(world / "base" / "model.safetensors")
    folder.mkdir()
    for number, (name, chosen) in enumerate(entries.items(), start=1):
        is_shared = any({*chosen} & {*other} for other in list(entries.values())[: number - 1])
        ticket = tasks.make_ticket(world / "base", chosen, number, on if is_shared else None)
        entry = TaskState(name, f"{number:02d}-{name}", {}, not is_shared, True, is_complete=True)
        (folder / entry.folder).mkdir()
        ticket.save(folder / entry.folder / "ticket")
        on = put_on(on, ticket)
        state.tasks.append(entry)
        entry.num_shared = ledger_of(state, folder).tasks[-1].num_shared
        state.stages.append(Stage(name, name, tuple(each.name for each in state.on_model)))
    names = [{"name": name} for name in entries]
    (folder / "config.yaml").write_text(yaml.safe_dump({"tasks": names, "output_dir": str(folder)}), encoding="utf-8")
    state.write(folder)
    write_ledger(state, ledger_of(state, folder), folder)
    (folder / "summary.json").write_text("{}", encoding="utf-8")
    return state


def put_on(weights: Mapping[str, Tensor], ticket: Ticket) -> dict[str, Tensor]:
    """The weights with a ticket's values assigned."""
    made = {name: tensor.clone() for name, tensor in weights.items()}
    for name in ticket.names:
        made[name].view(-1)[ticket.mask.indices(name)] = ticket.values(name)
    return made

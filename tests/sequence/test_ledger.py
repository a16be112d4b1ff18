"""Owned and free entries add up to the eligible ones in every tensor, as a dense count has them, overlapping or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lota.cli import main
from lota.sequence.ledger import Share, find_task, layer_table, make_ledger, table
from lota.ticket import Mask, Ticket

SHAPES = {
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "lm_head.weight": (32, 4),
}


def masks(num: int, density: float = 0.4, seed: int = 0) -> list[Mask]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Mask.from_dense({name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()})
        for _ in range(num)
    ]


def test_an_entry_is_its_last_tasks() -> None:
    chosen = masks(4)
    found = make_ledger("abcd", chosen)
    for name in SHAPES:
        owner = torch.zeros(SHAPES[name], dtype=torch.int64)
        for number, mask in enumerate(chosen, start=1):
            owner[mask.dense(name)] = number
        counts = torch.bincount(owner.flatten(), minlength=5).tolist()
        assert found.tensors[name] == Share(owner.numel(), counts[0], tuple(counts[1:]))
    assert found.whole.eligible == found.whole.free + sum(found.whole.owned)
    for number, task in enumerate(found.tasks):
        before = {n: torch.stack([m.dense(n) for m in chosen[:number]]).any(0) for n in SHAPES} if number else {}
        shared = sum(int((chosen[number].dense(name) & dense).sum()) for name, dense in before.items())
        assert (task.num_active, task.num_shared) == (chosen[number].num_active, shared)
        assert task.num_owned == found.whole.owned[number] and task.num_changed is None
    assert found.tasks[-1].num_owned == found.tasks[-1].num_active


def test_disjoint_tasks_own_what_they_have() -> None:
    parts = [torch.arange(n).view(s) % 3 for s in SHAPES.values() for n in [s[0] * s[1]]]
    chosen = [Mask.from_dense({n: part == r for n, part in zip(SHAPES, parts)}) for r in (0, 1)]
    found = make_ledger(["one", "other"], chosen)
    assert all(task.num_shared == 0 and task.num_owned == task.num_active for task in found.tasks)
    assert found.layers.keys() == {"model.layers.0", "model.layers.1", "outside"}
    assert found.layers["model.layers.0"].eligible == 64 + 128 and found.layers["outside"].eligible == 128
    assert found.kinds.keys() == {"self_attn.q_proj", "mlp.up_proj", "lm_head"}
    for shares in (found.layers, found.kinds, found.tensors):
        assert sum(share.free for share in shares.values()) == found.whole.free
        assert all(share.eligible == share.free + sum(share.owned) for share in shares.values())


def test_tasks_that_choose_among_different_tensors_and_rows() -> None:
    name, other = "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
    one = Mask.from_indices({name: ((32, 4), torch.arange(8, 40))}, rows={name: (2, 12)})
    two = Mask.from_indices(
        {name: ((32, 4), torch.tensor([100])), other: ((16, 8), torch.arange(3))}, rows={name: (20, 30)}
    )
    found = make_ledger(["one", "two"], [one, two])
    assert found.tensors[name] == Share(80, 80 - 33, (32, 1))  # 10 rows of each
    assert found.tensors[other] == Share(128, 125, (0, 3))
    overlapping = Mask.from_indices({name: ((32, 4), torch.tensor([], dtype=torch.int64))}, rows={name: (10, 25)})
    assert make_ledger("abc", [one, two, overlapping]).tensors[name].eligible == 4 * 28
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(32, 4\) in one and \(4, 4\) in two"):
        make_ledger(["one", "two"], [one, Mask.from_dense({name: torch.ones(4, 4, dtype=torch.bool)})])


def test_nothing_at_all() -> None:
    found = make_ledger([], [])
    assert found.whole == Share(0, 0, ()) and found.layers == {} and table(found)[-1][4] == "0"
    empty = make_ledger(["a"], [Mask.from_dense({"a.weight": torch.zeros(0, 4, dtype=torch.bool)})])
    assert empty.whole == Share(0, 0, (0,)) and layer_table(empty, empty.tensors)[1] == ["a.weight", ".", ".", "0"]


def test_the_command_prints_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = []
    for number, mask in enumerate(masks(2)):
        values = {name: torch.full((mask.active(name),), 1.5) for name in SHAPES}
        before = {name: torch.zeros(mask.active(name)) for name in SHAPES}
        places.append(str(tmp_path / f"task{number}" / "ticket"))
        (tmp_path / f"task{number}").mkdir()
        Ticket(mask, values, before).save(places[-1])
    found = make_ledger(["task0", "task1"], [Ticket.load(place) for place in places])
    assert main(["ledger", *places, "--json", "--plot", str(tmp_path / "ledger.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["eligible"], told["free"]) == (found.whole.eligible, found.whole.free)
    assert [task["name"] for task in told["tasks"]] == ["task0", "task1"]
    assert told["tasks"][1]["num_shared"] == found.tasks[1].num_shared > 0
    assert told["tasks"][0]["num_changed"] == found.tasks[0].num_active
    assert told["tensors"]["lm_head.weight"]["owned"] == dict(
        zip(["task0", "task1"], found.tensors["lm_head.weight"].owned)
    )
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")
    assert main(["ledger", *places, "--per-tensor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["task0", f"{found.tasks[0].num_active:,}"] and lines[-1].startswith(
        "lm_head.weight"
    )
    assert main(["ledger", str(tmp_path / "task0")]) == 2
    assert "expected a ticket's directory" in capsys.readouterr().err


def test_a_task_that_is_none_is_refused_with_the_nearest() -> None:
    assert find_task("sql", ["math", "sql"]) == 1
    with pytest.raises(ValueError, match=r"no task 'sqll' here: there are math, sql. Did you mean 'sql'\?"):
        find_task("sqll", ["math", "sql"])

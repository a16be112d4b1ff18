"""The base, or another ticket, in the sharded model for the length of a `with`: every bit, and every bit back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.ticket import Ticket
from tests.zero import cases


def _initialize(model: Any, world: int, threshold: int) -> Any:
    import deepspeed

    return deepspeed.initialize(
        model=model,
        optimizer=cases.default_optimizer(model),
        config=cases.config(1, world, bf16={"enabled": True}, zero={"stage3_param_persistence_threshold": threshold}),
    )[0]


def _logits(engine: Any, rows: slice) -> torch.Tensor:
    x, flags, _ = next(iter(cases.micro_batches(1, 1)))
    with torch.no_grad():
        return engine(x[rows].bfloat16(), flags[rows]).clone()


def _train(engine: Any, rows: slice, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        for x, flags, target in cases.micro_batches(step, 1):
            logits = engine(x[rows].bfloat16(), flags[rows])
            engine.backward(F.cross_entropy(logits.float(), target[rows]))
            engine.step()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one)


def exchanging(folder: Path, threshold: int, shard_group_size: int | None) -> dict[str, Any]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    mask = lota.Mask.from_dense(cases.make_masks())
    options = {"shard_group_size": shard_group_size}
    with lota.sparse_zero3(mask, **options) as run:  # another ticket of the same base
        engine = _initialize(cases.make_model(torch.bfloat16), world, threshold)
        untrained = cases.gathered(engine.module)
        base_logits = _logits(engine, rows)
        _train(engine, rows, 10, 2)
        run.save_ticket(folder / "other")
        other, other_logits = cases.gathered(engine.module), _logits(engine, rows)
        engine.destroy()
    found: dict[str, bool] = {}
    with lota.sparse_zero3(mask, **options) as run:
        engine = _initialize(cases.make_model(torch.bfloat16), world, threshold)
        _train(engine, rows, 1, 2)
        trained, logits = cases.gathered(engine.module), _logits(engine, rows)
        found["moved"] = not _same(trained, untrained)
        with run.base() as model:
            found["base logits"] = torch.equal(_logits(engine, rows), base_logits)
            found["base"] = _same(cases.gathered(model), untrained)
            for refused in ("step", "ticket", "again"):
                try:
                    if refused == "step":
                        engine.optimizer.lota_step()
                    elif refused == "ticket":
                        run.save_ticket(folder / "never")
                    else:
                        with run.base():
                            pass
                except ValueError:
                    found[f"refuses {refused}"] = True
        found["trained again"] = _same(cases.gathered(engine.module), trained)
        found["trained logits"] = torch.equal(_logits(engine, rows), logits)
        ticket = Ticket.load(folder / "other")
        with run.applied(ticket) as model:
            found["other"] = _same(cases.gathered(model), other)
            found["other logits"] = torch.equal(_logits(engine, rows), other_logits)
        found["trained again after a ticket"] = _same(cases.gathered(engine.module), trained)
        values = run.values()
        _train(engine, rows, 3, 2)
        found["values"] = (rank > 0) == (values == {})
        run.save_ticket(folder / "end")
        end = cases.gathered(engine.module)
        engine.destroy()
    with lota.sparse_zero3(mask, **options) as run:  # without looking at the base between
        engine = _initialize(cases.make_model(torch.bfloat16), world, threshold)
        _train(engine, rows, 1, 2)
        run.save_ticket(folder / "middle")
        _train(engine, rows, 3, 2)
        found["training is the same"] = _same(cases.gathered(engine.module), end)
        engine.destroy()
    if rank == 0:
        middle = Ticket.load(folder / "middle")
        found["values are the ticket's"] = all(
            torch.equal(values[name].view(torch.int16), middle.values(name).view(torch.int16)) for name in middle.names
        )
    return found


def values(folder: Path, group: int) -> bool:
    """Whether rank 0 has exactly the ticket's values, in its order, and the others nothing."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    with lota.sparse_zero3(lota.Mask.from_dense(cases.make_masks()), shard_group_size=group) as run:
        engine = _initialize(cases.make_model(torch.bfloat16), world, 0)
        _train(engine, rows, 1, 2)
        found = run.values()
        run.save_ticket(folder / f"of-{group}")
        engine.destroy()
    if rank > 0:
        return found == {}
    ticket = Ticket.load(folder / f"of-{group}")
    return list(found) == list(ticket.names) and all(
        torch.equal(found[name].view(torch.int16), ticket.values(name).view(torch.int16)) for name in ticket.names
    )


@pytest.mark.parametrize("group", [1, 2, 4])
def test_values_are_those_of_the_ticket_on_four_ranks(ranks: Any, tmp_path: Path, group: int) -> None:
    assert all(ranks(4).run(values, tmp_path, group))


@pytest.mark.parametrize("threshold", [0, 1_000_000])
@pytest.mark.parametrize(("world", "group"), [(1, None), (2, None), (2, 1)])
def test_what_is_exchanged_comes_back(
    ranks: Any, tmp_path: Path, world: int, group: int | None, threshold: int
) -> None:
    for found in ranks(world).run(exchanging, tmp_path, threshold, group):
        assert all(found.values()), [name for name, is_right in found.items() if not is_right]

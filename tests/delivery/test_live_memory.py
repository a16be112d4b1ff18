"""On a live model memory counts, not names: what shares it, what has none, and what happened since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lota.delivery.live import apply_, exchange_
from lota.ticket import BaseTensor, Mask, Ticket
from tests.delivery.test_live import identity_of, state


def ticket_of(weights: dict[str, Tensor], seed: int = 1, *, known: bool = True, keep: float = 0.3) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(weight.shape, generator=generator) < keep for name, weight in weights.items()}
    mask = Mask.from_dense(masks, {name: identity_of(weight) for name, weight in weights.items()} if known else None)
    before = {name: weight.detach()[masks[name]].clone() for name, weight in weights.items()}
    values = {name: torch.randn(len(part), generator=generator).to(part.dtype) for name, part in before.items()}
    return Ticket(mask, values, before)


def linear(size: int = 20, **options: Any) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(size, size, bias=False, **options)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_names_are_one_memory() -> None:
    model = Tied()
    before = state(model)
    both = ticket_of({"embedding.weight": model.embedding.weight, "head.weight": model.head.weight})
    with pytest.raises(ValueError, match="shares memory with another tensor"):
        apply_(model, both)
    first = torch.zeros(8, 4, dtype=torch.bool)
    first[:2] = True
    apart = Ticket(
        Mask.from_dense({"embedding.weight": first, "head.weight": ~first}),
        {"embedding.weight": torch.ones(8), "head.weight": torch.full((24,), 2.0)},
    )
    applied = apply_(model, apart)
    assert model.head.weight[:2].eq(1).all() and model.embedding.weight[2:].eq(2).all()
    applied.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_views_that_overlap_are_one_memory() -> None:
    memory = torch.randn(100)
    model = nn.Module()
    model.one, model.other = nn.Parameter(memory[:60]), nn.Parameter(memory[40:])
    before = memory.clone()
    every = {"one": torch.ones(60, dtype=torch.bool), "other": torch.ones(60, dtype=torch.bool)}
    values = {"one": torch.zeros(60), "other": torch.ones(60)}
    with pytest.raises(ValueError, match="shares memory"):
        apply_(model, Ticket(Mask.from_dense(every), values))
    assert torch.equal(memory, before)


def _replaced(model: nn.Linear, size: int) -> None:
    model.weight = nn.Parameter(torch.zeros(size, size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: _replaced(model, 10), "replaced or resized"),
        (lambda model: _replaced(model, 20), "replaced or resized"),
        (lambda model: _replaced(model, 40), "replaced or resized"),
        (lambda model: delattr(model, "weight"), "deleted"),
        (lambda model: model.double(), "cast model"),
        (lambda model: setattr(model.weight, "data", torch.zeros(2, 2)), "replaced or resized"),
    ],
)
def test_a_handle_whose_memory_is_gone_writes_nothing(change: Callable[[Any], None], message: str) -> None:
    model = linear()
    applied = apply_(model, ticket_of({"weight": model.weight}))
    change(model)
    before = state(model)
    with pytest.raises(ValueError, match=message):
        applied.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_handles_come_off_in_any_order_or_say_why_not() -> None:
    model = linear()
    before = state(model)
    halves = torch.rand(20, 20) < 0.5
    tickets = [
        Ticket(Mask.from_dense({"weight": half}), {"weight": torch.full((int(half.sum()),), value)})
        for half, value in ((halves, 1.0), (~halves, 2.0))
    ]
    first, second = (apply_(model, ticket) for ticket in tickets)
    first.revert()
    second.revert()
    assert torch.equal(model.weight, before["weight"])
    first, over = apply_(model, tickets[0]), apply_(model, tickets[0])
    with pytest.raises(ValueError, match="revert the later handle first"):
        first.revert()
    with pytest.raises(ValueError, match="revert the later handle first"):
        exchange_(model, first, tickets[1])
    over.revert()
    first.revert()
    assert torch.equal(model.weight, before["weight"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_cannot_hold_the_values_are_refused(dtype: torch.dtype) -> None:
    model = nn.Module()
    model.first = nn.Parameter(torch.zeros(8))
    model.weight = nn.Parameter(torch.zeros(8).to(dtype), requires_grad=False)
    where = {"first": torch.ones(8, dtype=torch.bool), "weight": torch.ones(8, dtype=torch.bool)}
    ticket = Ticket(Mask.from_dense(where), {"first": torch.ones(8), "weight": torch.full((8,), 1.7)})
    with pytest.raises(ValueError, match="weight: expected weights in bfloat16"):
        apply_(model, ticket)
    assert not model.first.any()


def test_a_value_that_would_become_infinite_is_refused() -> None:
    model = linear(dtype=torch.float16)
    ticket = Ticket(Mask.from_indices({"weight": ((20, 20), torch.tensor([3]))}), {"weight": torch.tensor([1e6])})
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        apply_(model, ticket)


def test_tensors_without_values_here_are_refused() -> None:
    model = linear()
    ticket = ticket_of({"weight": model.weight})
    with pytest.raises(ValueError, match="meta device and has no values"):
        apply_(copy.deepcopy(model).to("meta"), ticket)
    model.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"as a parameter that ZeRO-3 partitioned is, so this rank does not have it"):
        apply_(model, ticket)


def test_parameters_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = linear()
        before = model.weight.clone()
        ticket = ticket_of({"weight": model.weight})
    applied = apply_(model, ticket)
    assert torch.equal(model.weight[ticket.mask.dense("weight")], ticket.values("weight"))
    applied.revert()
    assert torch.equal(model.weight, before)


def test_an_error_in_the_middle_of_the_writes_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(linear(), linear(), linear())
    ticket = ticket_of({f"{number}.weight": model[number].weight for number in range(3)})
    before = state(model)
    original, calls = Tensor.index_copy_, []

    def failing(self: Tensor, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *args)

    monkeypatch.setattr(Tensor, "index_copy_", failing)
    with pytest.raises(torch.OutOfMemoryError):
        apply_(model, ticket)
    monkeypatch.undo()
    assert len(calls) > 2 and all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.Sequential(model)[0]])
def test_what_is_wrapped_around_a_model_does_not_matter(wrap: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(linear(), linear())
    before = state(model)
    ticket = ticket_of({"1.weight": model[1].weight})
    applied = apply_(wrap(model), ticket)
    assert torch.equal(model[1].weight[ticket.mask.dense("1.weight")], ticket.values("1.weight"))
    applied.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_frozen_tensors_are_the_bases_too_unless_nobody_asks() -> None:
    model = nn.Sequential(linear(), linear())
    weight, frozen = model[1].weight, {"0.weight": identity_of(model[0].weight)}
    ticket = ticket_of({"1.weight": weight})
    base: dict[str, BaseTensor] = ticket.mask.base
    known = Ticket(ticket.mask.with_base(base, frozen), {"1.weight": ticket.values("1.weight")})
    apply_(model, known).revert()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"0\.weight: expected the base's own weights .* which were not trained"):
        apply_(model, known)
    apply_(model, known, verify=False).revert()
    apply_(model, ticket).revert()  # one that does not know them

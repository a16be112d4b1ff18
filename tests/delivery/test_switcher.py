"""Tickets are switched on one model, and whatever was on, the bits are those of the tickets and the base."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lota
from lota.delivery.switcher import TicketSwitcher
from lota.ticket import Mask, Ticket
from tests.delivery.test_live import identity_of, state

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(30, 20, dtype=dtype), nn.Linear(20, 10, dtype=dtype)


def make_ticket(model: nn.Module, seed: int, chosen: dict[str, Tensor] | None = None) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() == 2}
    masks = chosen or {name: torch.rand(w.shape, generator=generator) < 0.3 for name, w in weights.items()}
    frozen = {name: identity_of(p) for name, p in model.named_parameters() if name not in weights}
    base = {name: identity_of(w) for name, w in weights.items()}
    mask = Mask.from_dense(masks).with_base(base, frozen)
    before = {name: w[masks[name]] for name, w in weights.items()}
    values = {
        name: (part.float() + torch.randn(part.shape, generator=generator)).to(part.dtype)
        for name, part in before.items()
    }
    return Ticket(mask, values, before)


def with_tickets(base: dict[str, Tensor], tickets: list[Ticket], rule: str) -> dict[str, Tensor]:
    """What the rule means, said plainly."""
    made = {name: tensor.clone() for name, tensor in base.items()}
    for name in tickets[0].names if tickets else ():
        total = torch.zeros(base[name].shape, dtype=torch.float32)
        count = torch.zeros(base[name].shape)
        for ticket in tickets:
            where = ticket.mask.dense(name)
            made[name][where] = ticket.values(name)
            total[where] += ticket.values(name).float() - base[name][where].float()
            count += where
        if rule == "sum":
            shared = count > 1
            made[name][shared] = (base[name].float() + total).to(base[name].dtype)[shared]
    return made


def equal(model: nn.Module, wanted: dict[str, Tensor]) -> bool:
    now = state(model)
    return all(torch.equal(now[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


@pytest.mark.parametrize("rule", ["last", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_switches_end_in_the_right_bits(dtype: torch.dtype, rule: str) -> None:
    """170 of 1,020 operations over the six cases."""
    model = Model(dtype)
    base = state(model)
    tickets = {str(number): make_ticket(model, number) for number in range(4)}
    switcher = TicketSwitcher(model, tickets, rule=rule)
    assert equal(model, base) and switcher.names == tuple(tickets)
    random_ = random.Random(f"{dtype} {rule}")
    for _ in range(170):
        kind = random_.randrange(4)
        if kind == 0:
            switcher.to(None)
        elif kind == 1:
            switcher.to(random_.choice(list(tickets)))
        elif kind == 2:
            switcher.to(random_.sample(list(tickets), random_.randint(0, 4)))
        else:
            name = random_.choice(list(tickets))
            switcher.remove(name)
            switcher.add(name, tickets[name])
        assert equal(model, with_tickets(base, [tickets[name] for name in switcher.on], rule))
        with switcher.using(random_.sample(list(tickets), 2)):
            assert equal(model, with_tickets(base, [tickets[name] for name in switcher.on], rule))
    switcher.to(None)
    assert equal(model, base)


def test_refusals_leave_the_model_alone() -> None:
    model = Model(torch.bfloat16)
    base = state(model)
    switcher = lota.TicketSwitcher(model, {"a": make_ticket(model, 1), "b": make_ticket(model, 2)})
    switcher.to("a")
    on = state(model)
    for names, message in ((["a", "b"], "share .* entries"), ("c", "no ticket called 'c'"), (["a", "a"], "once")):
        with pytest.raises(ValueError, match=message):
            switcher.to(names)
        assert equal(model, on) and switcher.on == ("a",)
    other = Model(torch.bfloat16)
    with torch.no_grad():
        other.one.bias[0] += 1  # a tensor that no ticket names
    with pytest.raises(ValueError, match=r"one\.bias: expected the base's own weights"):
        switcher.add("c", make_ticket(other, 3))
    assert equal(model, on) and switcher.names == ("a", "b")
    with pytest.raises(ValueError, match="rule must be one of"):
        TicketSwitcher(model, rule="mean")
    switcher.to(None)
    assert equal(model, base)


def test_loaded_tickets_on_the_host(tmp_path: Path) -> None:
    model = Model(torch.bfloat16)
    base = state(model)
    make_ticket(model, 1).save(tmp_path / "a")
    ticket = Ticket.load(tmp_path / "a")
    switcher = TicketSwitcher(model, {"a": ticket}, device="cpu")
    switcher.to("a")
    assert equal(model, with_tickets(base, [ticket], "last"))

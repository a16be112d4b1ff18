"""Applying assigns exactly the ticket's values, reverting restores every bit, and a wrong base is refused untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lota.delivery.live import apply_, exchange_
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex

SHAPES = {"first.weight": (7, 5), "second.weight": (3, 7)}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7, dtype=dtype)
        self.second = nn.Linear(7, 3, dtype=dtype)


def identity_of(tensor: Tensor) -> BaseTensor:
    return BaseTensor(str(tensor.dtype).removeprefix("torch."), to_hex(fingerprint(tensor.detach().flatten())))


def make_ticket(model: nn.Module, seed: int = 1, dtype: torch.dtype | None = None, keep: float = 0.4) -> Ticket:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: param.detach() for name, param in model.named_parameters() if name in SHAPES}
    mask = Mask.from_dense(
        {name: torch.rand(shape, generator=generator) < keep for name, shape in SHAPES.items()},
        base={name: identity_of(weight) for name, weight in weights.items()},
    )
    values = {
        name: torch.randn(mask.active(name), generator=generator).to(dtype or weights[name].dtype) for name in SHAPES
    }
    return Ticket(mask, values, {name: weights[name].flatten()[mask.indices(name)] for name in SHAPES}, {})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_active_entries_get_the_values_and_revert_restores_all_bits(dtype: torch.dtype) -> None:
    model = Model(dtype)
    with torch.no_grad():
        model.first.weight.view(-1)[:2] = torch.tensor([-0.0, float("nan")])  # bits that arithmetic would not restore
    before, ticket = state(model), make_ticket(model)
    applied = apply_(model, ticket)
    for name, tensor in model.state_dict().items():
        expected = before[name].clone()
        if name in SHAPES:
            expected[ticket.mask.dense(name)] = ticket.values(name)
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name
    applied.revert()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    with pytest.raises(ValueError, match="it was reverted"):
        applied.revert()


def test_fp32_values_are_rounded_to_the_weights() -> None:
    model = Model(torch.bfloat16)
    ticket = make_ticket(model, dtype=torch.float32)
    apply_(model, ticket)
    got = model.first.weight.detach()[ticket.mask.dense("first.weight")]
    assert torch.equal(got, ticket.values("first.weight").bfloat16())


def test_a_wrong_base_is_refused_before_anything_is_written() -> None:
    ticket = make_ticket(Model(torch.bfloat16))
    other = Model(torch.bfloat16)
    with torch.no_grad():
        other.second.weight[0, 0] += 1  # the first tensor still is the base's
    before = state(other)
    with pytest.raises(ValueError, match=r"second\.weight.*fingerprint"):
        apply_(other, ticket)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(ValueError, match="bfloat16, got"):
        apply_(Model(torch.float32), ticket)
    with pytest.raises(ValueError, match=r"first\.weight, which the model does not have"):
        apply_(nn.Linear(2, 2), ticket)
    apply_(Model(torch.bfloat16), ticket)
    twice = Model(torch.bfloat16)
    apply_(twice, ticket)
    with pytest.raises(ValueError, match="already changed"):
        apply_(twice, ticket)


def same_bits(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(t.view(torch.uint8), expected[name].view(torch.uint8)) for name, t in state(model).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_exchange_is_revert_and_apply_bit_for_bit(dtype: torch.dtype) -> None:
    model = Model(dtype)
    with torch.no_grad():
        model.first.weight.view(-1)[:2] = torch.tensor([-0.0, float("nan")])
    base = state(model)
    tickets = [make_ticket(model, seed) for seed in (1, 2, 3)]  # they share entries
    expected = []
    for ticket in tickets:
        applied = apply_(model, ticket)
        expected.append(state(model))
        applied.revert()
    assert not same_bits(model, expected[0])
    handle = apply_(model, tickets[0])
    for number in (1, 2, 0, 0):
        spent, handle = handle, exchange_(model, handle, tickets[number])
        assert same_bits(model, expected[number])
        with pytest.raises(ValueError, match="exchanged for another"):
            spent.revert()
    handle.revert()
    assert same_bits(model, base)
    with pytest.raises(ValueError, match="it was reverted"):
        exchange_(model, handle, tickets[0])


def test_exchange_refuses_what_apply_refuses_and_leaves_model_and_handle_alone() -> None:
    model = Model(torch.bfloat16)
    base, ticket = state(model), make_ticket(model)
    handle = apply_(model, ticket)
    applied = state(model)
    with pytest.raises(ValueError, match=r"first\.weight.*fingerprint"):
        exchange_(model, handle, make_ticket(Model(torch.bfloat16, seed=7)))
    with pytest.raises(ValueError, match="another model"):
        exchange_(Model(torch.bfloat16), handle, ticket)
    frozen = int((~ticket.mask.dense("second.weight")).flatten().nonzero()[0])
    with torch.no_grad():  # a frozen entry moved while the ticket was on: the base is not under it any more
        model.second.weight.view(-1)[frozen] += 1
    with pytest.raises(ValueError, match=r"second\.weight.*fingerprint"):
        exchange_(model, handle, ticket)
    with torch.no_grad():
        model.second.weight.view(-1)[frozen] = base["second.weight"].view(-1)[frozen]
    assert same_bits(model, applied)
    handle.revert()
    assert same_bits(model, base)


def test_several_tickets_go_on_and_off_together_when_they_share_no_entry() -> None:
    model = Model(torch.bfloat16)
    base, one = state(model), make_ticket(model)
    rest = Mask.from_dense({name: ~one.mask.dense(name) for name in SHAPES}, one.mask.base)
    other = Ticket(rest, {name: torch.full((rest.active(name),), 2.0, dtype=torch.bfloat16) for name in SHAPES})
    handle = apply_(model, [one, other])
    for name in SHAPES:
        expected = torch.full(SHAPES[name], 2.0, dtype=torch.bfloat16)
        expected[one.mask.dense(name)] = one.values(name)
        assert torch.equal(model.get_parameter(name), expected)
    handle = exchange_(model, handle, other)
    active = one.mask.dense("first.weight")
    assert torch.equal(model.first.weight[active], base["first.weight"][active])
    handle.revert()
    assert same_bits(model, base)
    with pytest.raises(ValueError, match=r"share \d+ entries"):
        apply_(model, [one, one])


def test_a_cast_model_cannot_take_its_bits_back() -> None:
    model = Model(torch.float32)
    handle = apply_(model, make_ticket(model))
    model.bfloat16()
    with pytest.raises(ValueError, match="Load the base again"):
        handle.revert()

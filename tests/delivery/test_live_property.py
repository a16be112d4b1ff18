"""Random tickets on random models, whose tensors share memory, applied, exchanged and reverted, with failures between:
the bits are always those that a plain copy of the memory says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lota.delivery.live import Applied, apply_, exchange_
from lota.ticket import Mask, Ticket

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENGTH = 48


class Failed(Exception):
    pass


def build(draw: Any) -> tuple[nn.Module, list[Tensor]]:
    """A model of some memories, of which its parameters are whole, tied or overlapping views."""
    model, memories = nn.Module(), []
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        memory = torch.randint(-(2**15), 2**15 - 1, (LENGTH,), dtype=torch.int16)
        memory = memory.repeat_interleave(dtype.itemsize // 2).view(dtype)
        memories.append(memory)
        for view in range(draw(st.integers(1, 3))):
            start = draw(st.integers(0, LENGTH - 8))
            stop = draw(st.integers(start + 4, LENGTH))
            setattr(model, f"p{number}_{view}", nn.Parameter(memory[start:stop], requires_grad=False))
    return model, memories


def make_ticket(draw: Any, model: nn.Module) -> Ticket:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    names = draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, unique=True))
    positions, values = {}, {}
    for name in names:
        size = tensors[name].numel()
        chosen = sorted(draw(st.sets(st.integers(0, size - 1), max_size=6)))
        positions[name] = ((size,), torch.tensor(chosen, dtype=torch.int64))
        bits = torch.tensor(draw(st.lists(st.integers(-999, 999), min_size=len(chosen), max_size=len(chosen))))
        values[name] = (bits / 7).to(tensors[name].dtype)
    return Ticket(Mask.from_indices(positions), values)


def write(model: nn.Module, ticket: Ticket) -> None:
    """What a ticket means, said plainly."""
    for name in ticket.names:
        getattr(model, name).data[ticket.mask.indices(name)] = ticket.values(name)


def bits(memories: list[Tensor]) -> list[Tensor]:
    return [memory.view(torch.uint8).clone() for memory in memories]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_the_bits_are_those_of_a_plain_copy(data: Any) -> None:
    model, memories = build(data.draw)
    base = bits(memories)
    stack: list[tuple[Applied, list[Tensor]]] = []  # handles, and the bits before each

    def expect(wanted: list[Tensor]) -> None:
        assert all(torch.equal(one, other) for one, other in zip(bits(memories), wanted, strict=True))

    for _ in range(data.draw(st.integers(1, 6))):
        kind = data.draw(st.sampled_from(("apply", "exchange", "revert", "fail")))
        before = bits(memories)
        if kind in ("apply", "fail") or not stack:
            ticket = make_ticket(data.draw, model)
            if kind == "fail":
                with pytest.MonkeyPatch.context() as patch:
                    left = [data.draw(st.integers(0, 3))]
                    original = Tensor.index_copy_

                    def failing(self: Tensor, *args: Any, left: Any = left, original: Any = original) -> Tensor:
                        left[0] -= 1
                        if left[0] == 0:
                            raise Failed
                        return original(self, *args)

                    patch.setattr(Tensor, "index_copy_", failing)
                    try:
                        handle = apply_(model, ticket)
                    except (Failed, ValueError):
                        expect(before)
                        continue
            else:
                try:
                    handle = apply_(model, ticket)
                except ValueError as error:
                    assert "shares memory" in str(error)
                    expect(before)
                    continue
            after = bits(memories)
            for memory, old in zip(memories, before, strict=True):
                memory.view(torch.uint8).copy_(old)
            write(model, ticket)
            expect(after)
            stack.append((handle, before))
        elif kind == "exchange":
            handle, under = stack[-1]
            ticket = make_ticket(data.draw, model)
            try:
                made = exchange_(model, handle, ticket)
            except ValueError:
                expect(before)
                continue
            after = bits(memories)
            for memory, old in zip(memories, under, strict=True):
                memory.view(torch.uint8).copy_(old)
            write(model, ticket)
            expect(after)
            stack[-1] = made, under
        else:
            handle, under = stack.pop()
            handle.revert()
            expect(under)
    while stack:
        handle, under = stack.pop()
        handle.revert()
        expect(under)
    expect(base)

"""The base's values, or a ticket's, in a sharded model for the length of a `with`: compact, nothing is gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lota.kernels import exchange_, scatter_
from lota.ticket import Ticket
from lota.zero.compact.layout import owned_range
from lota.zero.compact.state import CompactState
from lota.zero.compact.training import SparseTraining
from lota.zero.deepspeed import weights


@contextmanager
def base_in_place(training: SparseTraining, optimizer: Any) -> Iterator[None]:
    """Active entries hold the base's bits in the block, and the trained ones after it. Collective: DeepSpeed gathers
    its persistent parameters anew.

    Two bytes an active entry are copied to the weights' device and back.
    """
    held = [state.base_values.to(state.weights.device) for state in training.states]
    with optimizer.lota_rewriting():
        for state, values in zip(training.states, held, strict=True):
            exchange_(state.weights, state.local_index, values)
    try:
        yield
    finally:
        with optimizer.lota_rewriting():
            for state, values in zip(training.states, held, strict=True):
                exchange_(state.weights, state.local_index, values)


@contextmanager
def fraction_in_place(training: SparseTraining, optimizer: Any, alpha: float) -> Iterator[None]:
    """Active entries hold `old + alpha * (master - old)`, rounded to the weights' dtype, in the block, and the trained
    bits after it. Collective as `base_in_place`."""
    held = [state.values(0, state.layout.local_active) for state in training.states]
    with optimizer.lota_rewriting():
        for state in training.states:
            scatter_(state.weights, state.local_index, between(state, alpha))
    try:
        yield
    finally:
        with optimizer.lota_rewriting():
            for state, values in zip(training.states, held, strict=True):
                scatter_(state.weights, state.local_index, values)


def settle(training: SparseTraining, optimizer: Any, alpha: float) -> None:
    """Make the masters `old + alpha * (master - old)`, and the weights what they round to. Collective likewise."""
    with optimizer.lota_rewriting():
        for state in training.states:
            state.master.copy_(between(state, alpha))
            scatter_(state.weights, state.local_index, state.master)


def between(state: CompactState, alpha: float) -> Tensor:
    """fp32, as long as the masters. alpha 1 gives their bits, and 0 the old values'."""
    if alpha == 1:
        return state.master.clone()
    old = torch.zeros_like(state.master)
    old[: state.layout.local_active].copy_(state.base_values)
    return old.add_(state.master - old, alpha=alpha)


@contextmanager
def ticket_in_place(
    model: torch.nn.Module, ticket: Ticket, optimizer: Any, shard_size: int, shard_rank: int
) -> Iterator[None]:
    """The ticket's values in this rank's pieces of the model, which is its base; the bits before it afterwards."""
    pieces = _pieces(model, ticket, shard_size, shard_rank)
    with optimizer.lota_rewriting():
        for data, positions, values, _ in pieces:
            data.index_copy_(0, positions, values)
    try:
        yield
    finally:
        with optimizer.lota_rewriting():
            for data, positions, _, before in pieces:
                data.index_copy_(0, positions, before)


def _pieces(
    model: torch.nn.Module, ticket: Ticket, shard_size: int, shard_rank: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every tensor of the ticket, this rank's piece, positions in it, the values, and the bits that are there."""
    parts: Mapping[str, Any] = {part.name: part for part in weights.partitions(model)}
    made = []
    for name in ticket.names:
        if name not in parts:
            raise ValueError(f"the ticket names {name}, which the model does not have")
        part = parts[name]
        ticket.mask.check_base(name, part.shape, str(part.dtype), None)
        if not ticket.mask.active(name):
            continue
        start, stop = owned_range(part.numel, shard_size, shard_rank)
        positions = ticket.mask.indices(name)
        first, last = torch.searchsorted(positions, torch.tensor([start, stop], dtype=torch.int64)).tolist()
        places = (positions[first:last] - start).to(part.data.device)
        before = part.data[places]
        if ticket.is_packed:
            raise ValueError("a packed ticket is read beside its whole base: unpack it first (lota unpack)")
        values = ticket.values(name)[first:last].to(part.data.device, part.dtype)
        made.append((part.data, places, values, before))
    return made

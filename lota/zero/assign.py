"""Tickets on a model that is sharded over all ranks, before it is trained: every rank writes into its own pieces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lota.messages import did_you_mean
from lota.ticket import BaseTensor, Ticket
from lota.ticket.fingerprint import add
from lota.zero.compact.layout import owned_range
from lota.zero.deepspeed import weights
from lota.zero.fingerprints import fingerprints
from lota.zero.new_tensors import mark_as_bases

_PACKED = "a packed ticket is read beside its whole base: unpack it first (lota unpack)"


def assign(model: torch.nn.Module, tickets: Sequence[Ticket], device: torch.device) -> None:
    """Write the tickets' values into the partitions of `model`, the base as transformers loads it under ZeRO-3.

    The base is held against the tickets' fingerprints first, so the tickets must be of it. One that shares entries with
    those before it is of the base with them, and overwrites. device: of collectives. Collective over the world.
    """
    parts = {part.name: part for part in weights.partitions(model)}
    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD if size > 1 else None
    now = fingerprints(parts.values(), size=size, rank=rank, group=group, device=device)
    base = dict(now)
    for ticket in tickets:
        if ticket.is_packed:
            raise ValueError(_PACKED)
        if not ticket.has_base_values:
            raise ValueError("a ticket without base values does not say what it changes: make it with them")
        _check(ticket, base, now)
        for name in ticket.names:
            part = parts[name]
            start, stop = owned_range(part.numel, size, rank)
            first, last, places = _own(ticket, name, start, stop)
            values = ticket.values(name)[first:last].to(part.data.device, part.dtype)
            part.data.index_copy_(0, places.to(part.data.device), values)
            change = ticket.mask.change(name)
            assert change is not None
            fingerprint = add(int(now[name].fingerprint, 16), change)
            now[name] = BaseTensor(now[name].dtype, f"{fingerprint:016x}")
    mark_as_bases(model, {name for ticket in tickets for name in ticket.mask.base})


def _own(ticket: Ticket, name: str, start: int, stop: int) -> tuple[int, int, Tensor]:
    """Which of the compact entries lie in the flat positions `start:stop`, and where in them."""
    positions = ticket.mask.indices(name)
    first, last = torch.searchsorted(positions, torch.tensor([start, stop], dtype=torch.int64)).tolist()
    return first, last, positions[first:last] - start


def _check(ticket: Ticket, base: dict[str, BaseTensor], now: dict[str, BaseTensor]) -> None:
    """ValueError unless the ticket is of the base, or of the base with the tickets before it."""
    for name in ticket.names:
        if name not in base:
            raise ValueError(f"the ticket names {name}, which the model does not have" + did_you_mean(name, base))
    known = [name for name in base if ticket.mask.identity(name) is not None]
    is_of_now = all(_is(ticket, name, now[name]) for name in known)
    for name in known:
        found = now[name] if is_of_now else base[name]
        shape = ticket.mask.shape(name) if name in ticket.names else ()
        ticket.mask.check_base(name, shape, found.dtype, found.fingerprint)


def _is(ticket: Ticket, name: str, found: BaseTensor) -> bool:
    base = ticket.mask.identity(name)
    return base is not None and base.fingerprint == found.fingerprint

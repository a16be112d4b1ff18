"""One ticket made from one: its differences scaled, or only the largest kept."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lota.algebra.models import ModelTensors
from lota.delivery.live import check_is_base
from lota.tensor_names import need_names
from lota.ticket import Mask, Ticket, TicketWriter

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def differences(ticket: Ticket, name: str) -> Tensor:
    """Value - base value of every active entry of a tensor, in fp32."""
    return ticket.values(name).float() - ticket.base_values(name).float()


def scale(ticket: Ticket, factor: float, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, int]:
    """Write the ticket with every value at base + factor * (value - base), in fp32, rounded to the values' dtype.

    1 gives the ticket's bits, 0 the base's, and what lies between is the dial between the new task and the old model;
    above 1 goes on beyond. Tensors of integers and flags are kept at 1, and refused otherwise.
    """
    if not math.isfinite(factor):
        raise ValueError(f"the factor must be a finite number, got {factor}")

    def made(name: str) -> Tensor:
        values, base = ticket.values(name), ticket.base_values(name)
        if factor == 1:
            return values
        if values.dtype not in _FLOATS:
            raise ValueError(f"{name} is {values.dtype}, whose values cannot be scaled")
        if factor == 0:
            return base.to(values.dtype)
        return (base.float() + factor * differences(ticket, name)).to(values.dtype)

    facts = ticket.provenance | {"scaled by": factor}
    return _write(ticket, ticket.mask, made, lambda name: slice(None), facts, out, overwrite)


def trim(ticket: Ticket, keep: float, out: str | os.PathLike[str], *, overwrite: bool = False) -> dict[str, int]:
    """Write the ticket with exactly round(keep * active) of its entries, those with the largest |value - base|; of
    equal ones the first. Tensors that are stored whole stay whole, and count."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
    mask = ticket.mask
    sparse = [name for name in mask.names if mask.active(name) and not _is_fixed(ticket, name)]
    fixed = sum(mask.active(name) for name in mask.names if _is_fixed(ticket, name))
    count = max(0, round(keep * mask.num_active) - fixed)
    sizes = np.concatenate([differences(ticket, name).abs().numpy() for name in sparse] or [np.zeros(0, np.float32)])
    count = min(count, sizes.size)
    threshold = np.partition(sizes, sizes.size - count)[sizes.size - count] if count else np.float32(np.inf)
    left = count - int((sizes > threshold).sum())  # of those at the threshold
    chosen: dict[str, Tensor] = {}
    for name in sparse:
        size = differences(ticket, name).abs()
        at = size == float(threshold)
        taken = (size > float(threshold)) | (at & (at.cumsum(0) <= left))
        left -= int((at & taken).sum())
        chosen[name] = taken.nonzero().squeeze(1)
    indices = {
        name: (mask.shape(name), mask.indices(name)[chosen[name]] if name in chosen else mask.indices(name))
        for name in mask.names
    }
    made = Mask.from_indices(indices, mask.base, mask.restricted_rows).with_base(mask.base, mask.frozen)
    facts = ticket.provenance | {"kept of its entries": keep}
    return _write(ticket, made, ticket.values, lambda name: chosen.get(name, slice(None)), facts, out, overwrite)


def pack(
    ticket: Ticket, out: str | os.PathLike[str], *, form: str = "packed", overwrite: bool = False
) -> dict[str, int]:
    """Write the ticket in another form of its file (`lota.ticket.TicketWriter`)."""
    if not ticket.has_base_values:
        raise ValueError("this ticket holds no base values, so its differences are not known")
    with TicketWriter(
        out, ticket.mask, ticket.provenance, model=ticket.model, overwrite=overwrite, form=form
    ) as writer:
        for name in ticket.names:
            writer.add(name, ticket.values(name), ticket.base_values(name))
    return {"num_active": ticket.num_active, "num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}


def unpack(
    ticket: Ticket, base: ModelTensors, out: str | os.PathLike[str], *, overwrite: bool = False
) -> dict[str, int]:
    """Write a packed ticket with its values and base values, which the base gives. ValueError for another base."""
    places = need_names(ticket.names, base.names, base.where)
    with TicketWriter(out, ticket.mask, ticket.provenance, model=ticket.model, overwrite=overwrite) as writer:
        for name in ticket.names:
            tensor = base.read(places[name])
            known = ticket.mask.base.get(name)
            if known is not None and tensor.is_floating_point() and known.rows is None:
                tensor = tensor.to(getattr(torch, known.dtype))
            check_is_base(ticket.mask, name, tensor)
            before = tensor.contiguous().view(-1)[ticket.mask.indices(name)]
            writer.add(name, ticket.values_on(name, before), before)
    return {"num_active": ticket.num_active, "num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}


def _is_fixed(ticket: Ticket, name: str) -> bool:
    """Tensors and rows that the base lacks, and whole tensors of other dtypes: they are all or nothing."""
    base = ticket.mask.base.get(name)
    return (base is not None and base.rows is not None) or ticket.values(name).dtype not in _FLOATS


def _write(
    ticket: Ticket,
    mask: Mask,
    values: Callable[[str], Tensor],
    part: Callable[[str], Any],
    facts: dict[str, Any],
    out: str | os.PathLike[str],
    overwrite: bool,
) -> dict[str, int]:
    if not ticket.has_base_values:
        raise ValueError("this ticket holds no base values, so its differences are not known")
    with TicketWriter(out, mask, facts, model=ticket.model, overwrite=overwrite) as writer:
        for name in mask.names:
            chosen = part(name)
            writer.add(name, values(name)[chosen], ticket.base_values(name)[chosen])
    return {"num_active": mask.num_active, "num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}

"""Tickets on a live model: applied by assignment, taken out again or exchanged, bit for bit; the base verified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lota.messages import did_you_mean
from lota.ticket import Mask, Ticket
from lota.ticket.fingerprint import add, fingerprint, fingerprint_at, to_hex
from lota.ticket.rows import row_size


class Applied:
    """What `apply_` replaced: the model's own bits, until `revert()` puts them back or `exchange_` takes them over."""

    def __init__(self, model: nn.Module, saved: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._model = model
        self._saved: dict[str, tuple[Tensor, Tensor]] | None = saved

    def revert(self) -> None:
        """Put back, in place, the bits that the active entries had before. ValueError when that was done already."""
        for flat, positions, bits in self._put_back(_tensors(self._model)).values():
            flat.index_copy_(0, positions, bits)
        self._saved = None

    def _put_back(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By tensor: where it lies flat, the active positions and the base's bits there; nothing is written."""
        if self._saved is None:
            raise ValueError("this handle's ticket is off already: it was reverted, or exchanged for another one")
        placed = {}
        for name, (positions, bits) in self._saved.items():
            flat = flatten(tensors[name])
            if flat.dtype != bits.dtype:
                raise ValueError(
                    f"{name}: expected weights in {bits.dtype}, as when the ticket was applied, got {flat.dtype}: bits "
                    "cannot be put back into a cast model. Load the base again."
                )
            placed[name] = flat, positions.to(flat.device), bits.to(flat.device)
        return placed


def apply_(model: nn.Module, ticket: Ticket | Sequence[Ticket]) -> Applied:
    """Assign the ticket's values into `model`, in place; the handle's `revert()` restores every bit.

    ticket: one, or several that share no entry. The model must be their base: whole (not ZeRO-3 partitions), with the
    base's dtype and fingerprints. Everything is read and checked before the first write; ValueError leaves the model
    as it was. Values in another dtype (fp32 tickets) are rounded to the weights'. Holds two values (one afterwards) and
    an int64 position per active entry.
    """
    return _assign(model, _as_list(ticket), {})


def exchange_(model: nn.Module, applied: Applied, ticket: Ticket | Sequence[Ticket]) -> Applied:
    """Swap what `applied` put into `model` for other tickets of the same base, in place, without loading it again.

    Returns the new handle, whose `revert()` restores the base; `applied` is spent. Bit for bit what reverting and
    applying give, with `apply_`'s promises: the fingerprints are those of the model with the base's bits put back, and
    ValueError leaves the model, and `applied`, as they were.
    """
    if applied._model is not model:
        raise ValueError("expected the handle that apply_ returned for this very model, got one of another model")
    handle = _assign(model, _as_list(ticket), applied._put_back(_tensors(model)))
    applied._saved = None
    return handle


@torch.no_grad()
def _assign(
    model: nn.Module, tickets: Sequence[Ticket], put_back: Mapping[str, tuple[Tensor, Tensor, Tensor]]
) -> Applied:
    """Check all, then write: `put_back` first, the tickets' values after it."""
    tensors = _tensors(model)
    check_disjoint(tickets)
    writes = []
    for ticket in tickets:
        for name in ticket.names:
            if name not in tensors:
                hint = _hint(ticket, name, tensors)
                raise ValueError(f"the ticket names {name}, which the model does not have" + hint)
            check_is_base(ticket.mask, name, tensors[name].detach(), put_back.get(name))
            if ticket.mask.active(name):
                flat = flatten(tensors[name])
                positions = ticket.mask.indices(name).to(flat.device)
                writes.append((name, flat, positions, ticket.values(name).to(flat.device, flat.dtype)))
    for flat, positions, bits in put_back.values():
        flat.index_copy_(0, positions, bits)
    saved: dict[str, tuple[Tensor, Tensor]] = {}
    for name, flat, positions, values in writes:
        entries = positions, flat[positions]
        flat.index_copy_(0, positions, values)
        if name in saved:  # another ticket, with other entries of this tensor
            earlier_positions, earlier_bits = saved[name]
            entries = torch.cat([earlier_positions, positions]), torch.cat([earlier_bits, entries[1]])
        saved[name] = entries
    return Applied(model, saved)


def check_is_base(mask: Mask, name: str, tensor: Tensor, put_back: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """ValueError unless `tensor`, with the bits of `put_back` in place, is the mask's base.

    Of a tensor of which the base has only some rows, or none, those are compared.
    """
    # Shape first: a ZeRO-3 partition would only give a meaningless fingerprint.
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    base = mask.base.get(name)
    if base is None or base.rows == 0:
        return
    stop = tensor.numel() if base.rows is None else base.rows * row_size(tensor.shape)
    found = fingerprint(flatten(tensor)[:stop])
    if put_back is not None:
        flat, positions, bits = put_back
        inside = positions < stop
        positions, bits = positions[inside], bits[inside]
        found = add(found, fingerprint_at(positions, bits), -fingerprint_at(positions, flat[positions]))
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), to_hex(found))


def grown(mask: Mask, name: str, tensor: Tensor | None) -> Tensor:
    """What the base has of tensor `name` (None: nothing) in the shape and dtype that the ticket is for: rows that the
    base lacks are zeros, to be assigned; a tensor that is stored whole has its own dtype."""
    base = mask.base.get(name)
    shape = mask.shape(name)
    if base is None:
        assert tensor is not None
        return tensor
    dtype = getattr(torch, base.dtype) if tensor is None or mask.is_dense(name) else tensor.dtype
    if base.rows == 0:
        tensor = None  # another tensor of this name, a head of another width say, is not the ticket's
    if base.rows is None:
        assert tensor is not None
        return tensor.to(dtype)
    made = torch.zeros(shape, dtype=dtype)
    if tensor is not None:
        if tuple(tensor.shape) != (base.rows, *shape[1:]):
            raise ValueError(
                f"{name}: expected {base.rows} rows of shape {shape[1:]} in the base, got shape {tuple(tensor.shape)}"
            )
        made[: base.rows] = tensor
    return made


def check_disjoint(tickets: Sequence[Ticket]) -> None:
    """ValueError where two tickets share an entry: neither could be applied as it is."""
    for number, ticket in enumerate(tickets):
        for other in tickets[:number]:
            shared = ticket.mask.overlap(other.mask)
            if shared:
                raise ValueError(
                    f"two tickets share {shared} entries, so neither can be applied as it is: merge them first"
                )


def _as_list(ticket: Ticket | Sequence[Ticket]) -> Sequence[Ticket]:
    return [ticket] if isinstance(ticket, Ticket) else list(ticket)


def _hint(ticket: Ticket, name: str, tensors: Mapping[str, Tensor]) -> str:
    base = ticket.mask.base.get(name)
    if base is not None and base.rows == 0:
        return f": the ticket brings it, for a {ticket.model.get('class') or 'model of another class'}. Load that class"
    return did_you_mean(name, tensors)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, under all of their names, and persistent buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    stored = model.state_dict(keep_vars=True).keys() - parameters.keys()
    buffers = {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in stored}
    return {**parameters, **buffers}


def flatten(tensor: Tensor) -> Tensor:
    """The tensor's elements as one dimension, sharing memory."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor, got one of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    return tensor.detach().view(-1)

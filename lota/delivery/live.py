"""Tickets on a live model: applied by assignment, taken out again or exchanged, bit for bit; the base verified.

What is saved and restored is memory, not names: a tensor may have several names (tied weights), and two may share some
of their memory. All of it is read, and everything that could fail is checked, before the first write; an error in the
middle of the writes is undone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lota.messages import did_you_mean
from lota.tensor_names import find_names
from lota.ticket import Mask, Ticket
from lota.ticket.fingerprint import fingerprint, to_hex
from lota.ticket.manifest import WHOLE_DTYPES
from lota.ticket.rows import row_size

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WHOLE = tuple(getattr(torch, name) for name in WHOLE_DTYPES)


@dataclass(frozen=True)
class _Entries:
    """Entries of a model's tensor: flat positions, int64 `[n]`, and what is there, or is to be, `[n]` in its dtype."""

    name: str
    tensor: Tensor
    positions: Tensor
    bits: Tensor


class Applied:
    """What `apply_` replaced: the model's own bits, until `revert()` puts them back or `exchange_` takes them over."""

    def __init__(self, model: nn.Module, saved: Sequence[_Entries]) -> None:
        self._model = model
        self._saved: list[_Entries] | None = list(saved)
        self._number = next(_NUMBERS)
        _HANDLES[self._number] = self

    def revert(self) -> None:
        """Put back, in place, the bits that the active entries had before.

        ValueError, and the model as it is, when that was done already, when another ticket was put on some of these
        entries since and is still there (revert that one first), and when a tensor was replaced, resized, cast or
        deleted since.
        """
        entries = self._to_put_back()
        with _undone_on_error() as write:
            for part in entries:
                write(part)
        self._saved = None

    def _to_put_back(self) -> list[_Entries]:
        """The base's bits, for the devices where the tensors are now; nothing is written."""
        if self._saved is None:
            raise ValueError("this handle's ticket is off already: it was reverted, or exchanged for another one")
        tensors = _tensors(self._model)
        for part in self._saved:
            now = tensors.get(part.name)
            if now is not part.tensor or now.numel() <= int(part.positions.max() if part.positions.numel() else -1):
                what = "deleted" if now is None else "replaced or resized"
                raise ValueError(f"{part.name} was {what} since the ticket was applied: load the base again")
            if now.dtype != part.bits.dtype:
                raise ValueError(
                    f"{part.name}: expected weights in {part.bits.dtype}, as when the ticket was applied, got "
                    f"{now.dtype}: bits cannot be put back into a cast model. Load the base again."
                )
            _check_writable(part.name, now, part.bits.dtype)
        self._check_is_last()
        return [
            _Entries(part.name, part.tensor, part.positions.to(part.tensor.device), part.bits.to(part.tensor.device))
            for part in self._saved
        ]

    def _check_is_last(self) -> None:
        """ValueError where a later handle holds some of the same memory, as it was under this ticket."""
        assert self._saved is not None
        for number, later in list(_HANDLES.items()):
            if number <= self._number or later._saved is None:
                continue
            if _shared_memory([*self._saved], [*later._saved]):
                raise ValueError(
                    "another ticket was applied to some of these entries since, and holds what they were under this "
                    "one: revert the later handle first"
                )


_NUMBERS = itertools.count()
_HANDLES: weakref.WeakValueDictionary[int, Applied] = weakref.WeakValueDictionary()
"""Every handle that somebody holds, by a number that grows as tickets are applied."""


def apply_(model: nn.Module, ticket: Ticket | Sequence[Ticket], *, verify: bool = True) -> Applied:
    """Assign the ticket's values into `model`, in place; the handle's `revert()` restores every bit.

    ticket: one, or several that share no entry. The model must be their base: whole (not ZeRO-3 partitions, DTensors or
    meta tensors), with the base's dtype and fingerprints, those of frozen tensors too; what DDP, torch.compile, PEFT or
    sentence-transformers put before the names does not matter. verify: False leaves the fingerprints out, which read
    the whole model: a switch then costs no more than the copy of its entries. Everything is read and checked before the
    first write; ValueError leaves the model as it was. Values in another dtype (fp32 tickets) are rounded to the
    weights'; one that overflows is refused. Holds two values (one afterwards) and an int64 position per active entry.
    """
    return _assign(model, _as_list(ticket), verify)


def exchange_(model: nn.Module, applied: Applied, ticket: Ticket | Sequence[Ticket], *, verify: bool = True) -> Applied:
    """Swap what `applied` put into `model` for other tickets of the same base, in place, without loading it again.

    Returns the new handle, whose `revert()` restores the base; `applied` is spent. Bit for bit what reverting and
    applying give, with `apply_`'s promises: ValueError leaves the model, and `applied`, as they were. verify: see
    `apply_`.
    """
    if applied._model is not model:
        raise ValueError("expected the handle that apply_ returned for this very model, got one of another model")
    with _undone_on_error() as write:
        for part in applied._to_put_back():
            write(part)
        handle = _assign(model, _as_list(ticket), verify)
    applied._saved = None
    return handle


@torch.no_grad()
def _assign(model: nn.Module, tickets: Sequence[Ticket], verify: bool) -> Applied:
    """Check all, then write."""
    check_disjoint(tickets)
    writes = [_Entries(*found) for ticket in tickets for found in locate_entries(model, ticket, verify)]
    _check_once(writes)
    saved = [_Entries(part.name, part.tensor, part.positions, flatten(part.tensor)[part.positions]) for part in writes]
    with _undone_on_error() as write:
        for part in writes:
            write(part)
    return Applied(model, saved)


def locate_entries(model: nn.Module, ticket: Ticket, verify: bool = True) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """For every tensor with active entries: the model's name of it, the tensor, and positions and values, on its device
    and in its dtype. ValueError where the model cannot take the ticket; nothing is written."""
    tensors = _tensors(model)
    prefix = getattr(model, "base_model_prefix", None)
    found_entries = []
    for name, found in find_names(ticket.names, tensors, prefix).items():
        if found is None:
            hint = _hint(ticket, name, tensors)
            raise ValueError(f"the ticket names {name}, which the model does not have" + hint)
        tensor = tensors[found]
        _check_present(found, tensor, ticket.mask.shape(name))
        check_is_base(ticket.mask, name, tensor.detach(), verify)
        if ticket.mask.active(name):
            flat = flatten(tensor)
            positions = ticket.mask.indices(name).to(flat.device)
            values = ticket.values_on(name, flat[positions])
            _check_writable(found, tensor, values.dtype)
            found_entries.append((found, tensor, positions, rounded(name, values.to(flat.device), flat)))
    if verify:
        _check_frozen(ticket.mask, tensors, prefix)
    return found_entries


@contextmanager
def _undone_on_error() -> Iterator[Any]:
    """A function that writes entries; what it wrote is taken back when the block ends in an error of any kind."""
    before: list[_Entries] = []

    def write(part: _Entries) -> None:
        with tensor_mode(part.tensor):
            flat = flatten(part.tensor)
            before.append(_Entries(part.name, part.tensor, part.positions, flat[part.positions]))
            flat.index_copy_(0, part.positions, part.bits)

    try:
        yield write
    except BaseException:
        for part in reversed(before):
            with tensor_mode(part.tensor):
                flatten(part.tensor).index_copy_(0, part.positions, part.bits)
        raise


@contextmanager
def tensor_mode(tensor: Tensor) -> Iterator[None]:
    """Tensors that were made in inference mode can be written in inference mode only."""
    with torch.inference_mode() if tensor.is_inference() else nullcontext(), torch.no_grad():
        yield


def _check_frozen(mask: Mask, tensors: Mapping[str, Tensor], prefix: str | None) -> None:
    """ValueError where a tensor that the mask leaves as it is is not the base's."""
    for name, found in find_names(mask.frozen, tensors, prefix).items():
        if found is not None and not _is_elsewhere(tensors[found]):
            check_frozen(mask, name, tensors[found].detach())


def check_frozen(mask: Mask, name: str, tensor: Tensor) -> bool:
    """ValueError where a tensor that the mask leaves as it is is not the base's, in the dtype in which the mask knows
    it; False where it cannot be compared (it is quantized)."""
    base = mask.frozen[name]
    wanted: torch.dtype = getattr(torch, base.dtype)
    if tensor.dtype != wanted and not (tensor.dtype in _FLOATS and wanted in _FLOATS):
        return False
    check_is_base(mask, name, tensor.to(wanted))
    return True


def check_is_base(mask: Mask, name: str, tensor: Tensor, verify: bool = True) -> None:
    """ValueError unless `tensor` is the mask's base: shape, dtype and (`verify`) fingerprint.

    Of a tensor of which the base has only some rows, or none, those are compared.
    """
    # Shape first: a part of a tensor would only give a meaningless fingerprint.
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    base = mask.identity(name)
    if base is None or base.rows == 0 or not verify:
        return
    stop = tensor.numel() if base.rows is None else base.rows * row_size(tensor.shape)
    flat = flatten(tensor if name in mask.names else tensor.contiguous())
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), to_hex(fingerprint(flat[:stop])))


def _is_elsewhere(tensor: Tensor) -> bool:
    """Whether the tensor's values are not in it: on another rank, on a disk, or nowhere."""
    return tensor.device.type == "meta" or tuple(tensor.shape) == (0,) or _is_dtensor(tensor)


def _is_dtensor(tensor: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _check_present(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError where the tensor, which should be of that shape, does not hold its values."""
    if tuple(tensor.shape) == (0,) != tuple(shape):
        raise ValueError(
            f"{name} is empty, as a parameter that ZeRO-3 partitioned is, so this rank does not have it: apply tickets "
            "to the whole model, before deepspeed.initialize and outside of zero.Init"
        )
    if _is_dtensor(tensor):
        raise ValueError(
            f"{name} is a DTensor, of which this rank holds a part: apply tickets before sharding the model"
        )
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load the model's weights first")


def _check_writable(name: str, tensor: Tensor, values: torch.dtype) -> None:
    """ValueError where values of that dtype cannot be what the tensor then holds."""
    _check_present(name, tensor, tuple(tensor.shape))
    check_dtype(name, tensor.dtype, values)
    flatten(tensor)


def check_dtype(name: str, weights: torch.dtype, values: torch.dtype) -> None:
    """ValueError where weights of one dtype cannot hold values of the other."""
    is_number = weights in _FLOATS and values in _FLOATS
    if not is_number and not (weights == values and values in _WHOLE):
        raise ValueError(
            f"{name}: expected weights in bfloat16, float16 or float32 (float64 works too), got {weights}: the "
            "ticket's values would become others. Load the base unquantized"
        )


def rounded(name: str, values: Tensor, flat: Tensor) -> Tensor:
    """The values in the dtype of `flat`; ValueError where a finite one is not finite there."""
    made = values.to(flat.dtype)
    if values.dtype != flat.dtype and bool((torch.isfinite(values) & ~torch.isfinite(made)).any()):
        raise ValueError(
            f"{name}: a value of the ticket is too large for {flat.dtype}: load the base in {values.dtype}"
        )
    return made


def _check_once(writes: Sequence[_Entries]) -> None:
    """ValueError where two names write the same memory: neither ticket's values would be what is there."""
    for number, part in enumerate(writes):
        others = [other for other in writes[:number] if other.name != part.name]
        if _shared_memory([part], others):
            raise ValueError(
                f"{part.name} shares memory with another tensor that the tickets name (tied weights, or overlapping "
                "views), and both have values for it: make the ticket with one of the names"
            )


def _shared_memory(these: Sequence[_Entries], others: Sequence[_Entries]) -> bool:
    """Whether any entry of the one is an entry of the other, whatever tensor it is reached by."""
    for part in these:
        start, stop = _range(part.tensor)
        for other in others:
            other_start, other_stop = _range(other.tensor)
            is_near = part.tensor.device == other.tensor.device and start < other_stop and other_start < stop
            if not is_near or not part.positions.numel() or not other.positions.numel():
                continue
            own = part.positions * part.tensor.element_size() + start
            few, many = sorted((own, other.positions * other.tensor.element_size() + other_start), key=len)
            many = many.sort().values
            nearest = torch.searchsorted(many, few.to(many.device)).clamp_(max=many.numel() - 1)
            reach = max(part.tensor.element_size(), other.tensor.element_size())
            below = (nearest - 1).clamp_(min=0)
            gaps = torch.minimum((many[nearest] - few).abs(), (many[below] - few).abs())
            if part.tensor.element_size() != other.tensor.element_size():
                if bool((gaps < reach).any()):
                    return True
            elif bool((gaps == 0).any()):
                return True
    return False


def _range(tensor: Tensor) -> tuple[int, int]:
    """The addresses of a contiguous tensor's memory."""
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


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


def _hint(ticket: Ticket, name: str, tensors: Collection[str]) -> str:
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

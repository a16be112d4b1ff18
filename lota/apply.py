"""Apply a ticket by assignment, to a live model (and back, bit for bit) or to a checkpoint on disk, base verified."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lota.ticket import Mask, Ticket
from lota.ticket.fingerprint import add, fingerprint, fingerprint_at, to_hex

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class Applied:
    """What `apply_` replaced: the model's own bits, until `revert()` puts them back or `exchange_` takes them over."""

    def __init__(self, model: nn.Module, saved: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._model = model
        self._saved: dict[str, tuple[Tensor, Tensor]] | None = saved

    def revert(self) -> None:
        """Put back, in place, the bits that the active entries had before. ValueError when that was done already."""
        for flat, positions, bits in self._put_back(_parameters(self._model)).values():
            flat.index_copy_(0, positions, bits)
        self._saved = None

    def _put_back(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By tensor: where it lies flat, the active positions and the base's bits there; nothing is written."""
        if self._saved is None:
            raise ValueError("this handle's ticket is off already: it was reverted, or exchanged for another one")
        placed = {}
        for name, (positions, bits) in self._saved.items():
            flat = _flat(parameters[name])
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
    handle = _assign(model, _as_list(ticket), applied._put_back(_parameters(model)))
    applied._saved = None
    return handle


@torch.no_grad()
def _assign(
    model: nn.Module, tickets: Sequence[Ticket], put_back: Mapping[str, tuple[Tensor, Tensor, Tensor]]
) -> Applied:
    """Check all, then write: `put_back` first, the tickets' values after it."""
    parameters = _parameters(model)
    _check_disjoint(tickets)
    writes = []
    for ticket in tickets:
        for name in ticket.names:
            if name not in parameters:
                raise ValueError(f"the ticket names {name}, which the model does not have" + _nearest(name, parameters))
            _check(ticket.mask, name, parameters[name].detach(), put_back.get(name))
            if ticket.mask.active(name):
                flat = _flat(parameters[name])
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


def apply_to_checkpoint(
    base: str | os.PathLike[str],
    tickets: Sequence[Ticket],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the checkpoint folder `out`: the safetensors folder `base` with the tickets' values assigned.

    Works a file at a time, so the model is never whole in memory; other files (configuration, tokenizer) are copied.
    Tickets must name this base and must not overlap. dtype: cast the base's floating tensors first, for tickets
    trained on a cast base. `out` appears by one rename when it is complete; ValueError leaves nothing behind.
    """
    base, out = Path(base), Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: choose another folder, or remove it first")
    files = sorted(base.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{base} holds no .safetensors file; other formats are not read")
    _check_disjoint(tickets)
    homes = {name: file for file in files for name in _names(file)}
    for ticket in tickets:
        for name in ticket.names:
            if name not in homes:
                raise ValueError(f"the ticket names {name}, which {base} does not hold" + _nearest(name, homes))
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in files:
            _apply_to_file(file, tickets, temporary / file.name, dtype)
        for other in base.iterdir():
            if other.is_file() and other.suffix not in (".safetensors", *_OTHER_FORMATS):
                shutil.copy(other, temporary / other.name)
        if dtype is not None:
            _set_dtype(temporary / "config.json", dtype)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _apply_to_file(file: Path, tickets: Sequence[Ticket], out: Path, dtype: torch.dtype | None) -> None:
    tensors: dict[str, Tensor] = {}
    with safe_open(file, framework="pt") as source:
        metadata = source.metadata()
        for name in source.keys():  # noqa: SIM118 (a safe_open is not iterable)
            tensor = source.get_tensor(name)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            tensors[name] = tensor
    for ticket in tickets:
        for name in ticket.names:
            if name in tensors:
                _check(ticket.mask, name, tensors[name])
    for ticket in tickets:
        for name in ticket.names:
            if name in tensors and ticket.mask.active(name):
                flat = _flat(tensors[name])
                flat.index_copy_(0, ticket.mask.indices(name), ticket.values(name).to(flat.dtype))
    save_file(tensors, out, metadata=metadata)


def _check(mask: Mask, name: str, tensor: Tensor, put_back: tuple[Tensor, Tensor, Tensor] | None = None) -> None:
    """ValueError unless `tensor`, with the bits of `put_back` in place, is the mask's base."""
    # Shape first: a ZeRO-3 partition would only give a meaningless fingerprint.
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    if name in mask.base:
        found = fingerprint(_flat(tensor))
        if put_back is not None:
            flat, positions, bits = put_back
            found = add(found, fingerprint_at(positions, bits), -fingerprint_at(positions, flat[positions]))
        mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), to_hex(found))


def _check_disjoint(tickets: Sequence[Ticket]) -> None:
    for number, ticket in enumerate(tickets):
        for other in tickets[:number]:
            shared = ticket.mask.overlap(other.mask)
            if shared:
                raise ValueError(
                    f"two tickets share {shared} entries, so neither can be applied as it is: merge them first"
                )


def _as_list(ticket: Ticket | Sequence[Ticket]) -> Sequence[Ticket]:
    return [ticket] if isinstance(ticket, Ticket) else list(ticket)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _flat(tensor: Tensor) -> Tensor:
    """The tensor's elements as one dimension, sharing memory."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor, got one of shape {tuple(tensor.shape)} and strides {tensor.stride()}"
        )
    return tensor.detach().view(-1)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as source:
        return list(source.keys())


def _nearest(name: str, names: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config else "dtype"
        config[key] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

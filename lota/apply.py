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
from lota.ticket.fingerprint import fingerprint, to_hex

_OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


class Applied:
    """What `apply_` replaced: the model's own bits, until `revert()` puts them back."""

    def __init__(self, model: nn.Module, saved: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._model, self._saved = model, saved

    def revert(self) -> None:
        """Put back, in place, the bits that the active entries had before. ValueError when that was done already."""
        if not self._saved:
            raise ValueError("this ticket was reverted already, or had no active entry: there is nothing to put back")
        parameters = _parameters(self._model)
        for name, (positions, bits) in self._saved.items():
            _flat(parameters[name]).index_copy_(0, positions, bits)
        self._saved = {}


@torch.no_grad()
def apply_(model: nn.Module, ticket: Ticket) -> Applied:
    """Assign the ticket's values into `model`, in place; the handle's `revert()` restores every bit.

    The model must be the ticket's base: whole (not ZeRO-3 partitions), with the base's dtype and fingerprints. All
    tensors are checked before the first is written; ValueError leaves the model as it was. Values in another dtype
    (fp32 tickets) are rounded to the weights'. Holds one saved value and an int64 position per active entry.
    """
    parameters = _parameters(model)
    for name in ticket.names:
        if name not in parameters:
            raise ValueError(f"the ticket names {name}, which the model does not have" + _nearest(name, parameters))
        _check(ticket.mask, name, parameters[name].detach())
    saved: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ticket.names:
        if ticket.mask.active(name):
            flat = _flat(parameters[name])
            positions = ticket.mask.indices(name).to(flat.device)
            saved[name] = positions, flat[positions]
            flat.index_copy_(0, positions, ticket.values(name).to(flat.device, flat.dtype))
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


def _check(mask: Mask, name: str, tensor: Tensor) -> None:
    # Shape first: a ZeRO-3 partition would only give a meaningless fingerprint.
    mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), None)
    if name in mask.base:
        mask.check_base(name, tuple(tensor.shape), str(tensor.dtype), to_hex(fingerprint(_flat(tensor))))


def _check_disjoint(tickets: Sequence[Ticket]) -> None:
    for number, ticket in enumerate(tickets):
        for other in tickets[:number]:
            shared = ticket.mask.overlap(other.mask)
            if shared:
                raise ValueError(
                    f"two tickets share {shared} entries, so neither can be applied as it is: merge them first"
                )


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

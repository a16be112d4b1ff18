"""Identity of a sharded model: a fingerprint per tensor, from every rank's own piece, without gathering anything."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.ticket import BaseTensor, Ticket
from lota.ticket.fingerprint import fingerprint, to_hex
from lota.ticket.manifest import WHOLE_DTYPES
from lota.ticket.rows import row_size
from lota.zero.compact.layout import owned_range

_DTYPE_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_BUFFER_DTYPES = {getattr(torch, name): name for name in WHOLE_DTYPES}
_MODULUS = 1 << 64


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"weights must be {', '.join(_DTYPE_NAMES.values())}, got {dtype}")
    return _DTYPE_NAMES[dtype]


def fingerprints(
    partitions: Iterable[Any],
    *,
    size: int,
    rank: int,
    group: Any,
    device: torch.device,
    correction: Mapping[str, int] | None = None,
    rows: Mapping[str, int] | None = None,
) -> dict[str, BaseTensor]:
    """Base identity of every partition (see `weights.partitions`), the same on every rank. Collective over `group`.

    size, rank: how many ranks hold the model together and this one's place among them. correction: added to a tensor's
    partial, e.g. to put the base's values back in place of trained ones. rows: of tensors of which only some leading
    rows are meant, how many.
    """
    names: list[str] = []
    dtypes: list[str] = []
    partials: list[int] = []
    for part in partitions:
        start, stop = owned_range(part.numel, size, rank)
        if rows is not None and part.name in rows:
            stop = max(start, min(stop, rows[part.name] * row_size(part.shape)))
        value = fingerprint(part.data[: stop - start], start) + (correction or {}).get(part.name, 0)
        names.append(part.name)
        dtypes.append(dtype_name(part.dtype))
        partials.append(value % _MODULUS)
    total = torch.tensor([_signed(value) for value in partials], dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(total, group=group)
    return {
        name: BaseTensor(dtype, f"{value % _MODULUS:016x}", (rows or {}).get(name))
        for name, dtype, value in zip(names, dtypes, total.tolist(), strict=True)
    }


def holding_nan(partitions: Iterable[Any], size: int, rank: int, group: Any, device: torch.device) -> list[str]:
    """Names of the tensors with a NaN on some rank of `group`; the same list on all of them. Collective. size, rank: as
    of `fingerprints`; what fills up the last ranks' pieces is whatever the memory held before, and does not count."""
    found = []
    for part in partitions:
        start, stop = owned_range(part.numel, size, rank)
        found.append((part.name, bool(torch.isnan(part.data[: stop - start]).any())))
    flags = torch.tensor([flag for _, flag in found], dtype=torch.int32, device=device)
    if group is not None:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return [name for (name, _), flag in zip(found, flags.tolist(), strict=True) if flag]


def buffer_fingerprints(buffers: Mapping[str, Tensor]) -> dict[str, BaseTensor]:
    """Identity of buffers, which every rank has whole. Local."""
    return {
        name: BaseTensor(_BUFFER_DTYPES[buffer.dtype], to_hex(fingerprint(buffer.detach().reshape(-1))))
        for name, buffer in buffers.items()
        if buffer.dtype in _BUFFER_DTYPES
    }


def without_tickets(base: Mapping[str, BaseTensor], tickets: Sequence[Ticket]) -> dict[str, BaseTensor]:
    """Identity of a base before the tickets that are on it, which share no entry with one another. Fingerprints are
    linear: what a ticket added is taken out again."""
    made = dict(base)
    for ticket in tickets:
        for name in ticket.names:
            change = ticket.mask.change(name)
            assert change is not None, "a packed ticket is not assigned to a sharded model"
            found = made[name]
            made[name] = replace(found, fingerprint=f"{(int(found.fingerprint, 16) - change) % _MODULUS:016x}")
    return made


def frozen_identity(
    base: Mapping[str, BaseTensor], new: Collection[str], named: Collection[str]
) -> dict[str, BaseTensor]:
    """Of the base's tensors those that are not `named` in a mask, nor `new`, which the base does not have (whole)."""
    return {name: tensor for name, tensor in base.items() if name not in named and name not in new}


def differing(
    tensors: Mapping[str, BaseTensor], expected: Mapping[str, BaseTensor], group: Any, device: torch.device
) -> list[str]:
    """Names whose fingerprint is not the expected one on some rank of `group`; the same list on all of them."""
    names = list(expected)
    flags = torch.tensor([tensors[name] != expected[name] for name in names], dtype=torch.int32, device=device)
    if group is not None:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def replicas_agree(tensors: Mapping[str, BaseTensor], group: Any, device: torch.device) -> bool:
    """Whether all ranks of `group` see the same fingerprints."""
    if group is None:
        return True
    values = torch.tensor([_signed(int(t.fingerprint, 16)) for t in tensors.values()], dtype=torch.int64, device=device)
    low, high = values.clone(), values.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(high, op=dist.ReduceOp.MAX, group=group)
    return bool(torch.equal(low, high))


def _signed(value: int) -> int:
    return value - _MODULUS if value >= _MODULUS // 2 else value

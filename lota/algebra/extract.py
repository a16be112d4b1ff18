"""Any two checkpoints of one model become a ticket: all that differs, or the largest part of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lota.algebra.models import ModelTensors, identity
from lota.delivery.rewrite import changed_positions
from lota.progress import Say, silent, tracked
from lota.selection import eligible, select
from lota.ticket import BaseTensor, Mask, TicketWriter
from lota.ticket.manifest import DTYPES

SCORES = ("magnitude", "relative")
_FLOATS = tuple(getattr(torch, name) for name in DTYPES)


@dataclass(frozen=True)
class Extracted:
    """num_changed: entries that differ between the two. num_active: those that the ticket holds; num_lost: those that
    differ and that it does not hold, and lost_norm, their part of the norm of the whole difference. num_bytes: of the
    ticket."""

    num_changed: int
    num_active: int
    num_lost: int
    lost_norm: float
    num_bytes: int


def extract(
    base: ModelTensors,
    tuned: ModelTensors,
    out: str | os.PathLike[str],
    *,
    density: float | None = None,
    score: str = "magnitude",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    say: Say = silent,
) -> Extracted:
    """Write the ticket directory `out`.

    density: None takes every entry whose bits differ, so that base + ticket is `tuned`, bit for bit. Else the part of
    the eligible entries (`include`, `exclude`: as in training) with the largest score: |difference|, or `relative`, by
    |difference| / |base|. dtype: cast the floating tensors of both first. A tensor of each model is in memory, and the
    indices. ValueError where the two are not of one model: other names, shapes or dtypes.
    """
    if score not in SCORES:
        raise ValueError(f"score must be {' or '.join(SCORES)}, got {score!r}")
    _check_names(base, tuned)
    pair = _Pair(base, tuned, dtype)
    identities: dict[str, BaseTensor] = {}
    changed: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    num_changed, total = 0, 0.0
    for name in tracked(base.names, "compared", say):
        one, other = pair.read(name)
        known = identity(one)
        if known is None:
            if changed_positions(one, other).numel():
                raise ValueError(
                    f"{name} is {one.dtype}, which no ticket holds, and differs: extract from plain weights"
                )
            continue
        identities[name] = known
        if one.dtype in _FLOATS:
            shapes[name] = tuple(one.shape)
        where = changed_positions(one, other)
        num_changed += where.numel()
        total += _squares(one, other, where)
        if where.numel() and density is None:
            whole = torch.arange(one.numel(), dtype=torch.int64)
            changed[name] = tuple(one.shape), where if one.dtype in _FLOATS else whole
    if num_changed == 0:
        raise ValueError(f"{tuned.where} is {base.where}, bit for bit: there is nothing to extract")
    if density is None:
        mask = Mask.from_indices(changed)
    else:
        taken = {name: shapes[name] for name in eligible(shapes, include, exclude)}
        mask = select(lambda: _scores(pair, taken, score), taken, density=density, alone=True).mask
    frozen = {name: known for name, known in identities.items() if name not in mask.names}
    mask = mask.with_base({name: identities[name] for name in mask.names}, frozen)
    kept, held = 0.0, 0
    facts: dict[str, Any] = {
        "class": tuned.kind or None,
        "model": base.where,
        "tuned": tuned.where,
        "made by": "lota extract",
    }
    facts |= {} if density is None else {"score": score, "density asked": density}
    facts = {key: value for key, value in facts.items() if value is not None} | dict(provenance or {})
    with TicketWriter(out, mask, facts, overwrite=overwrite) as writer:
        for name in mask.names:
            one, other = pair.read(name)
            where = mask.indices(name)
            before, after = (tensor.contiguous().view(-1)[where] for tensor in (one, other))
            writer.add(name, after, before)
            kept += _squares(before, after, slice(None))
    held = writer.num_changed or 0
    lost = max(0.0, 1.0 - kept / total) ** 0.5 if total else 0.0
    return Extracted(num_changed, mask.num_active, num_changed - held, lost, writer.num_bytes)


class _Pair:
    """Both models' tensors of one name, in one dtype."""

    def __init__(self, base: ModelTensors, tuned: ModelTensors, dtype: torch.dtype | None) -> None:
        self._base, self._tuned, self._dtype = base, tuned, dtype

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        one, other = self._base.read(name), self._tuned.read(name)
        if self._dtype is not None:
            one, other = (
                tensor.to(self._dtype) if tensor.is_floating_point() and tensor.element_size() > 1 else tensor
                for tensor in (one, other)
            )
        if one.shape != other.shape:
            raise ValueError(
                f"{name}: shape {tuple(one.shape)} in {self._base.where}, {tuple(other.shape)} in {self._tuned.where}: "
                "a ticket is of one model (rows that were added are trained with dense)"
            )
        if one.dtype != other.dtype:
            raise ValueError(
                f"{name}: {one.dtype} in {self._base.where}, {other.dtype} in {self._tuned.where}: give the dtype that "
                "both are to be cast to"
            )
        return one, other


def _check_names(base: ModelTensors, tuned: ModelTensors) -> None:
    for one, other in ((base, tuned), (tuned, base)):
        missing = [name for name in one.names if name not in set(other.names)]
        if missing:
            more = f" (and {len(missing) - 1} more tensors)" if missing[1:] else ""
            raise ValueError(f"{other.where} has no {missing[0]}{more}, which {one.where} has: they are two models")


def _scores(pair: _Pair, shapes: Mapping[str, tuple[int, ...]], score: str) -> Iterator[tuple[str, int, Tensor]]:
    for name in shapes:
        one, other = (tensor.float().reshape(-1) for tensor in pair.read(name))
        made = (other - one).abs_()
        if score == "relative":
            made = torch.where(made > 0, made / one.abs(), made)
        yield name, 0, made


def _squares(one: Tensor, other: Tensor, where: Any) -> float:
    first, second = (tensor.reshape(-1)[where].double() for tensor in (one, other))
    return float(((second - first) ** 2).nan_to_num(0.0).sum())

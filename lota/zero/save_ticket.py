"""Compact values of many ranks become a ticket, one tensor at a time; an error of any rank is raised on all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.files import naming_disk_full
from lota.ranks.agree import raise_together
from lota.ticket import Mask, TicketWriter
from lota.ticket.fingerprint import fingerprint_at
from lota.zero.compact.layout import owned_range
from lota.zero.compact.outline import MaskOutline
from lota.zero.compact.reduction import ReductionGroups
from lota.zero.compact.training import SparseTraining


def base_put_back(training: SparseTraining) -> dict[str, int]:
    """What turns the fingerprints of this rank's trained pieces into the base's, if only active entries moved.

    Fingerprints are linear: the trained values are taken out and the base's put in.
    """
    groups = training.groups
    corrections: dict[str, int] = {}
    for state in training.states:
        for slot in state.layout.slots:
            entries = state.entries(slot)
            start, _ = owned_range(slot.numel, groups.shard_size, groups.shard_rank)
            correction = 0
            for first, last in state.runs(entries.start, entries.stop):
                positions = state.local_index.positions(first, last).cpu().add_(start - slot.local_origin)
                correction += fingerprint_at(positions, state.base_values[first:last])
                correction -= fingerprint_at(positions, state.values(first, last).cpu())
            corrections[slot.name] = correction
    return corrections


def deliver(
    training: SparseTraining,
    outline: MaskOutline,
    mask: Mask | None,
    path: str | Path,
    provenance: Mapping[str, Any] | None,
    *,
    stored: Mapping[str, tuple[Tensor, Tensor]],
    model: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    overwrite: bool,
    form: str,
    device: torch.device,
) -> dict[str, Any]:
    """Write the ticket from rank 0 and return its counts on every rank. Collective over the world.

    outline: of what was trained, with the base's identity. mask: on rank 0, which alone needs its indices, what the
    ticket holds; else None. stored: values and base values of tensors of the mask that were not trained (buffers).
    model: see `Manifest`. form: see `TicketWriter`.
    Only one tensor's values are gathered at a time. An error of the writer does not stop the gathering, which the other
    ranks take part in; it is raised on every rank at the end: a rank that did not receive it would hang.
    """
    writer: TicketWriter | None = None
    error: Exception | None = None
    if mask is not None:
        try:
            with naming_disk_full(Path(path)):
                writer = TicketWriter(path, mask, provenance or {}, model=model, overwrite=overwrite, form=form)
        except Exception as caught:  # noqa: BLE001 (raised on every rank)
            error = caught
    raise_together(error)
    try:
        for name in outline.names:
            values, base = collect(training, outline, name, dtype, device)
            if writer is not None and error is None:
                try:
                    with naming_disk_full(Path(path)):
                        writer.add(name, values, base)
                except Exception as caught:  # noqa: BLE001 (raised on every rank)
                    error = caught
        if writer is not None and error is None:
            try:
                with naming_disk_full(Path(path)):
                    for name, (values, base) in stored.items():
                        writer.add(name, values, base)
                    writer.close()
            except Exception as caught:  # noqa: BLE001 (raised on every rank)
                error = caught
    finally:
        if writer is not None:
            writer.abandon()
    raise_together(error)
    counts: dict[str, int] = {}
    if writer is not None and mask is not None:
        counts = {"num_active": mask.num_active, "num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}
    box = [counts]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(
    training: SparseTraining, outline: MaskOutline, name: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All values and base values of a tensor on rank 0 (empty elsewhere), from the shard group that rank 0 is in."""
    groups, rank = training.groups, dist.get_rank()
    base_dtype = getattr(torch, outline.base[name].dtype)
    empty = torch.empty(0, dtype=dtype or base_dtype), torch.empty(0, dtype=base_dtype)
    if not outline.active(name) or rank >= groups.shard_size:
        return empty
    _, slot = training.slot(name)
    own = training.current_values(name, dtype)
    values, base = (_to_first(tensor, slot.counts, groups, device) for tensor in own)
    return values, base


def _to_first(tensor: Tensor, counts: Sequence[int], groups: ReductionGroups, device: torch.device) -> Tensor:
    """The ranks' pieces, `counts[r]` entries of rank r of the shard group, one after another on its first rank, in host
    memory; empty on the others. Collective over the group.

    A collective that reductions use too: point-to-point calls would make a communicator for every pair of ranks.
    """
    if groups.shard is None:
        return tensor.cpu()
    item, is_first = tensor.element_size(), groups.shard_rank == 0
    sizes = [item * count for count in counts]
    received = torch.empty(sum(sizes) if is_first else 0, dtype=torch.uint8, device=device)
    nothing = [0] * len(sizes)
    dist.all_to_all_single(
        received,
        tensor.to(device).view(torch.uint8),
        sizes if is_first else nothing,
        [sizes[groups.shard_rank], *nothing[1:]],
        group=groups.shard,
    )
    return received.cpu().view(tensor.dtype)

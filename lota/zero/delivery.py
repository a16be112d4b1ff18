"""Compact values of many ranks become a ticket, one tensor at a time; whatever goes wrong, every rank hears of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.folder import naming_disk_full
from lota.ticket import Mask, TicketWriter
from lota.ticket.fingerprint import fingerprint_at
from lota.zero.agreement import raise_together
from lota.zero.layout import owned_range
from lota.zero.sparse import SparseTraining


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
            positions = state.local_index.positions(entries.start, entries.stop).cpu() - slot.local_origin + start
            values, base = training.current_values(slot.name, None)
            corrections[slot.name] = fingerprint_at(positions, base) - fingerprint_at(positions, values)
    return corrections


def deliver(
    training: SparseTraining,
    mask: Mask,
    path: str | Path,
    provenance: Mapping[str, Any] | None,
    *,
    stored: Mapping[str, tuple[Tensor, Tensor]],
    model: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    overwrite: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Write the ticket from rank 0 and return its counts on every rank. Collective over the world.

    stored: values and base values of tensors of the mask that were not trained (buffers). model: see `Manifest`.

    Only one tensor's values are gathered at a time. An error of the writer does not stop the gathering, which the other
    ranks take part in; it is raised on every rank at the end, whatever it is: a rank that never heard would hang.
    """
    writer: TicketWriter | None = None
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            with naming_disk_full(Path(path)):
                writer = TicketWriter(path, mask, provenance or {}, model=model, overwrite=overwrite)
        except Exception as caught:  # noqa: BLE001 (raised on every rank)
            error = caught
    raise_together(error)
    try:
        for name in mask.names:
            values, base = stored[name] if name in stored else _collect(training, mask, name, dtype, device)
            if writer is not None and error is None:
                try:
                    with naming_disk_full(Path(path)):
                        writer.add(name, values, base)
                except Exception as caught:  # noqa: BLE001 (raised on every rank)
                    error = caught
        if writer is not None and error is None:
            try:
                with naming_disk_full(Path(path)):
                    writer.close()
            except Exception as caught:  # noqa: BLE001 (raised on every rank)
                error = caught
    finally:
        if writer is not None:
            writer.abandon()
    raise_together(error)
    counts = [] if writer is None else [{"num_changed": writer.num_changed or 0, "bytes": writer.num_bytes}]
    box: list[Any] = counts or [None]
    dist.broadcast_object_list(box, src=0)
    return {"num_active": mask.num_active} | box[0]


def _collect(
    training: SparseTraining, mask: Mask, name: str, dtype: torch.dtype | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """All values and base values of a tensor on rank 0 (empty elsewhere), from the shard group that rank 0 is in."""
    groups, rank = training.groups, dist.get_rank()
    base_dtype = getattr(torch, mask.base[name].dtype)
    empty = torch.empty(0, dtype=dtype or base_dtype), torch.empty(0, dtype=base_dtype)
    if not mask.active(name) or rank >= groups.shard_size:
        return empty
    _, slot = training.slot(name)
    own = training.current_values(name, dtype)
    if rank > 0:
        for tensor in own:
            if tensor.numel():
                dist.send(tensor.to(device).view(torch.uint8), 0, group=groups.shard)
        return empty
    gathered = [[tensor] for tensor in own]
    for source in range(1, groups.shard_size):
        for pieces in gathered:
            received = torch.empty(slot.counts[source], dtype=pieces[0].dtype, device=device)
            if received.numel():
                dist.recv(received.view(torch.uint8), source, group=groups.shard)
            pieces.append(received.cpu())
    values, base = (torch.cat(pieces) for pieces in gathered)
    return values, base

"""Persistent buffers of a model in a block: those that a ticket stores whole, and the others, which may not move."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from lota.ticket import BaseTensor, Mask
from lota.ticket.rows import whole
from lota.zero.checkpoint.vectors import Vector
from lota.zero.deepspeed import weights
from lota.zero.fingerprints import buffer_fingerprints, differing


class StoredBuffers:
    """The buffers of `model` (BatchNorm's statistics, say), of which those named `stored` go into the ticket."""

    def __init__(self, model: torch.nn.Module, stored: Collection[str]) -> None:
        self._model, self.stored = model, tuple(stored)
        self.base: dict[str, BaseTensor] = {}
        self._base_values: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Take the buffers as they are now for the base's."""
        buffers = weights.buffers(self._model)
        self.base = buffer_fingerprints(buffers)
        self._base_values = {name: buffers[name].detach().reshape(-1).to("cpu", copy=True) for name in self.stored}

    def check_unmoved(self, group: torch.distributed.ProcessGroup | None, device: torch.device) -> None:
        """RuntimeError, on every rank of `group`, where a buffer that is not stored is no longer the base's."""
        now = buffer_fingerprints(weights.buffers(self._model))
        expected = {name: tensor for name, tensor in self.base.items() if name not in self.stored}
        moved = differing(now, expected, group, device)
        if moved:
            raise RuntimeError(
                f"{len(moved)} buffers changed during the run, {moved[0]} first, and base + ticket would be a model "
                f"without that: the ticket was not written. Pass dense={moved if len(moved) < 4 else moved[:3]} "
                "(patterns work) to lota.sparse_zero3 to store such buffers whole in the ticket, or keep their modules "
                "in evaluation mode"
            )

    def add_to(self, mask: Mask) -> Mask:
        """The mask with the stored buffers, whole."""
        buffers = weights.buffers(self._model)
        shapes = {name: tuple(buffers[name].shape) for name in self.stored}
        base = mask.base | {name: self.base[name] for name in self.stored}
        return mask.with_dense({name: (shape, whole(shape)) for name, shape in shapes.items()}, base)

    def values(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of every stored buffer this rank's values and the base's, flat, on the CPU."""
        buffers = weights.buffers(self._model)
        return {name: (buffers[name].detach().reshape(-1).cpu(), base) for name, base in self._base_values.items()}

    def vectors(self) -> list[Vector]:
        """For a checkpoint: every rank offers a buffer whole, and all take back what the first rank wrote."""
        buffers = weights.buffers(self._model)
        return [Vector.of(f"{name}.buffer", 0, buffers[name].detach().view(-1)) for name in self.stored]

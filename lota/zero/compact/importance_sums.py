"""Importance in place of steps: squared gradients of this rank's micro-batches, before anything is reduced. No
DeepSpeed here.

A gradient is squared as it appears, so the unit is one rank's micro-batch whatever the number of ranks; only the sums
are added up over ranks, once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lota.retention.factors import ExactSums, SquareSums
from lota.retention.importance import Importance
from lota.ticket import Mask
from lota.zero.checkpoint.vectors import Vector


class ImportanceSums:
    """Fed with whole gradients one tensor at a time, like `GradientScores`; the weights stay.

    shapes: of the tensors that take part. mask: also collect exact sums at its active entries, in 8 bytes an entry on
    every rank while it lasts.
    """

    is_spoilt = False

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], mask: Mask | None, device: torch.device) -> None:
        self._shapes, self._device = dict(shapes), device
        self._sums = {name: SquareSums(shape, device) for name, shape in shapes.items()}
        self._pending = {name: SquareSums(shape, device) for name, shape in shapes.items()}
        devices = dict.fromkeys(shapes, device)
        self._exact = None if mask is None else ExactSums(mask, devices)
        self._exact_pending = None if mask is None else ExactSums(mask, devices)
        self._has_arrived = False
        self.num_backwards = self._backwards_of_step = 0

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Square a whole tensor's gradient (any float dtype) of one backward of this rank."""
        self._has_arrived = True
        self._pending[name].add(gradient)
        if self._exact_pending is not None:
            self._exact_pending.add(name, gradient)

    def finish_backward(self, last: bool) -> None:
        self._backwards_of_step += 1

    def step(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Take the micro-batches since the last step, unless one of any rank has a gradient that is not finite. The
        norm of this rank's gradients and that flag, as device scalars. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for sums in self._pending.values():
            total += sums.rows.sum()
        skip = (~torch.isfinite(total)).to(torch.int32)
        if dist.get_world_size() > 1:
            dist.all_reduce(skip, op=dist.ReduceOp.MAX)
        if not bool(skip):  # read on the host: this runs a few dozen times in all
            factor = torch.full_like(total, loss_scale**-2)
            for name, sums in self._pending.items():
                self._sums[name].add_(sums, factor)
            if self._exact is not None and self._exact_pending is not None:
                self._exact.add_(self._exact_pending, factor)
            self.num_backwards += self._backwards_of_step
        self._forget()
        return (total / loss_scale**2).sqrt(), skip.bool()

    def _forget(self) -> None:
        for sums in self._pending.values():
            sums.zero_()
        if self._exact_pending is not None:
            self._exact_pending.zero_()
        self._has_arrived, self._backwards_of_step = False, 0

    def discard_gradients(self) -> None:
        """Forget the micro-batches since the last step (`zero_grad`)."""
        if self.is_mid_step():
            self._forget()

    def importance(self, facts: Mapping[str, Any]) -> Importance:
        """Of all micro-batches of all ranks, the same on every rank. Collective."""
        if self.num_backwards == 0:
            raise ValueError("no micro-batch ended inside the block: train at least one step")
        world = dist.get_world_size()
        parts = [part for sums in self._sums.values() for part in (sums.rows, sums.columns)]
        parts += [] if self._exact is None else list(self._exact.values.values())
        for part in parts if world > 1 else ():
            if part.numel():
                dist.all_reduce(part)
        facts = {"micro_batches": self.num_backwards * world, **facts}
        return Importance.of_sums(self._shapes, self._sums, self._exact, facts)

    def not_finite(self) -> dict[str, Tensor]:
        """For each tensor whether a gradient of this rank since the last step is not finite; bool scalars."""
        return {name: ~torch.isfinite(self._pending[name].rows.sum()) for name in reversed(self._pending)}

    def is_mid_step(self) -> bool:
        return self._has_arrived or self._backwards_of_step > 0

    def nbytes(self) -> dict[str, int]:
        kinds: list[Any] = [*self._sums.values(), *self._pending.values(), self._exact, self._exact_pending]
        return {"importance": sum(kind.nbytes for kind in kinds if kind is not None)}

    def numbers(self) -> NoReturn:
        raise ValueError(
            "importance is collected in one go, in a few dozen micro-batches, and has no checkpoints: set "
            "save_strategy='no'"
        )

    def vectors(self) -> list[Vector]:
        self.numbers()

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        self.numbers()

    def restored(self, numbers: Mapping[str, Any]) -> None:
        self.numbers()

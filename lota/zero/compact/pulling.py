"""The pull of a run to the values that it began with: its strength at every entry and its rate at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lota.kernels import Pull
from lota.retention import Importance, strength
from lota.schedule import total_learning_rate
from lota.ticket import Mask
from lota.zero.compact.state import CompactState


@dataclass
class Retained:
    """What a run keeps in view. pull: the sum of the rates over the run. num_steps: how many steps there will be, asked
    before the first one where it is a function; None: the schedule tells."""

    importances: Sequence[Importance]
    pull: float
    num_steps: int | Callable[[], int | None] | None = None

    @property
    def identity(self) -> list[Any]:
        """What must be the same for a run to be resumed, as JSON."""
        return [self.pull, [importance.digest for importance in self.importances]]


class Pulling:
    """The rates of the pull by parameter group, and the compact importance of every state.

    The rate of a step is `pull * lr / total`, where `total` is the sum over the run of the group's learning rates: the
    rates of a run add up to `pull` whatever its schedule.
    """

    def __init__(self, retained: Retained, states: Sequence[CompactState], mask: Mask) -> None:
        self.retained = retained
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}
        self.num_pulled = 0
        for state in states:
            self._parts[id(state)] = self._part(state, mask)
        self._totals: list[float] = []
        self._used: dict[int, Tensor] = {}

    def _part(self, state: CompactState, mask: Mask) -> tuple[Tensor, Tensor]:
        """Old values in the weights' dtype and importance in bf16, both compact and padded to tiles."""
        device, length = state.weights.device, state.master.numel()
        old = torch.zeros(length, dtype=state.weights.dtype, device=device)
        old[: state.layout.local_active].copy_(state.base_values)
        importance = torch.zeros(length, dtype=torch.bfloat16, device=device)
        for slot in state.layout.slots:
            entries = state.entries(slot)
            before = sum(slot.counts[: state.layout.rank])  # active entries of the tensor that earlier ranks own
            own = strength(self.retained.importances, mask, slot.name)[before : before + slot.counts[state.layout.rank]]
            importance[entries].copy_(own)
            self.num_pulled += int((importance[entries] > 0).sum())
        return old, importance

    def begin(self, optimizer: Any, scheduler: Any) -> None:
        """Before the first step: find the sum of the learning rates. ValueError where nobody knows how many steps there
        will be."""
        if not self._totals:
            given = self.retained.num_steps
            self._totals = total_learning_rate(optimizer, scheduler, given() if callable(given) else given)

    def rate(self, group: int, lr: float | Tensor, skip: Tensor) -> Tensor:
        """The rate of this step, an fp32 device scalar; a skipped step does not count."""
        total = self._totals[group]
        rate = torch.as_tensor(lr, dtype=torch.float64, device=skip.device) * (
            self.retained.pull / total if total else 0.0
        )
        if group not in self._used:
            self._used[group] = torch.zeros((), dtype=torch.float64, device=skip.device)
        self._used[group] += rate * (1 - skip.double())
        return rate.float()

    def of(self, state: CompactState, rate: Tensor) -> Pull:
        """The kernels' argument."""
        old, importance = self._parts[id(state)]
        return Pull(old, importance, rate)

    def reached(self) -> dict[int, float]:
        """By parameter group, the sum of the rates so far; `pull` at the end of a run whose schedule was as planned."""
        return {group: float(used) for group, used in self._used.items()}

    def nbytes(self) -> dict[str, int]:
        parts = self._parts.values()
        return {
            "old_values": sum(old.nbytes for old, _ in parts),
            "importance": sum(importance.nbytes for _, importance in parts),
        }

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"totals": self._totals, "used": {str(group): used for group, used in self.reached().items()}}

    def restore(self, numbers: Mapping[str, Any], device: torch.device) -> None:
        self._totals = list(numbers["totals"])
        self._used = {
            int(group): torch.tensor(used, dtype=torch.float64, device=device)
            for group, used in numbers["used"].items()
        }

"""Steps skipped because gradients were not finite: counted, and too many in a row end the run with a tensor's name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

_LOG = logging.getLogger("lota")


class SkippedSteps:
    """Counts consecutive skipped steps, the same on every rank, because the skip flag is agreed over all of them.

    limit: the step that makes so many raises. DeepSpeed asks for the flag after every step, so nothing is read from
    the device for this; names are looked for only in a step that may be the last.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.in_a_row = limit, 0
        self._flags: dict[str, Tensor] = {}

    def before_step(self, flags: Callable[[], Mapping[str, Tensor]]) -> None:
        """flags: for each tensor whether this rank has a gradient of it that is not finite (bool scalars, the same
        names in the same order on all ranks); called if this step may end the run."""
        self._flags = dict(flags()) if self.in_a_row + 1 >= self.limit else {}

    def after_step(self, was_skipped: bool, step: int, *, counts: bool = True) -> None:
        """FloatingPointError, on every rank, if this was one too many. Collective if so.

        counts: False where a lower loss scale may still help, as it does at the beginning of every fp16 run.
        """
        if not was_skipped:
            self.in_a_row = 0
            return
        if not counts:
            return
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            self.stop(step, self._flags)
        if dist.get_rank() == 0:
            _LOG.warning(
                "step %d was skipped: its gradients are not finite (%d in a row; %d end the run)",
                *(step, self.in_a_row, self.limit),
            )

    def stop(self, step: int, flags: Mapping[str, Tensor], cure: str = "") -> None:
        """Raise FloatingPointError with the name of the first tensor that any rank flags. Collective."""
        names = _flagged_anywhere(flags)
        where = f"{names[0]} (and {len(names) - 1} of {len(flags) - 1} others)" if names else "no single tensor"
        skipped = f", and {self.in_a_row} steps in a row were skipped for that" if self.in_a_row else ""
        raise FloatingPointError(
            f"step {step}: expected finite gradients, got inf or nan{skipped}; first in {where}. {cure}The weights are "
            "those of the last step that was not skipped. Lower learning_rate or clip (max_grad_norm); look for rows "
            "that make the loss inf or nan; train in bf16 rather than fp16; or allow more of them with "
            "max_skipped_steps"
        )


def _flagged_anywhere(flags: Mapping[str, Tensor]) -> list[str]:
    """Names that any rank flags, in order. Collective over the world."""
    if not flags:
        return []
    flagged = torch.stack([flag.to(torch.int32).reshape(()) for flag in flags.values()])
    if dist.get_world_size() > 1:
        dist.all_reduce(flagged, op=dist.ReduceOp.MAX)
    return [name for name, flag in zip(flags, flagged.tolist()) if flag]

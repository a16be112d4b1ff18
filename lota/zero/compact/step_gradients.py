"""What was delivered since the last step, in both phases: how many backwards ended, and whether all of it was sent."""

from __future__ import annotations

from lota.zero.compact.reduction import GradientReducer


class StepGradients:
    """The gradients of one step, between the first one that autograd completes and the step that uses them.

    A step may follow any number of backwards, whatever `gradient_accumulation_steps` says: its gradient is their sum.
    Every rank must end the same number of backwards, because weights are gathered in them; `num_backwards` and
    `is_pending` are then equal on all ranks between backwards, also where a rank had no gradient of its own.

    reducer: None where there is nobody to reduce with; gradients then go straight to where they are summed.
    """

    def __init__(self, reducer: GradientReducer | None) -> None:
        self.reducer = reducer
        self.num_backwards = 0
        self.num_reductions = 0
        self._has_arrived = self._is_unsent = False

    @property
    def is_pending(self) -> bool:
        """Whether there are gradients that no step has used yet."""
        return self._has_arrived or self.num_backwards > 0

    def arrive(self) -> None:
        """A gradient of this rank is complete."""
        self._has_arrived = True

    def finish_backward(self, last: bool) -> None:
        """A backward ended (`last`: of the step, as far as DeepSpeed knows): reduce what is due. Collective."""
        self.num_backwards += 1
        self._reduce(last)

    def complete(self) -> None:
        """Before the gradients are used: send what waits for the end of the step, which was only known now. Collective
        where something does, which all ranks know the same way."""
        if self._is_unsent:
            self._reduce(True)

    def end_step(self) -> None:
        """The gradients were used."""
        self.num_backwards = 0
        self._has_arrived = self._is_unsent = False

    def discard(self) -> bool:
        """Forget all gradients since the last step; whether there were any."""
        if not self.is_pending:
            return False
        if self.reducer is not None:
            self.reducer.discard()
        self.end_step()
        return True

    def _reduce(self, last: bool) -> None:
        is_due = last or self.reducer is None or self.reducer.reduce_every == "micro_step"
        self._is_unsent = not is_due
        if self.reducer is not None:
            self.reducer.finish(last)
        self.num_reductions += int(is_due)

    @property
    def bytes_sent(self) -> int:
        return 0 if self.reducer is None else self.reducer.bytes_sent

    @property
    def buffer_bytes(self) -> int:
        return 0 if self.reducer is None else self.reducer.buffer_bytes

"""The run behind `importance_zero3`: which tensors take part, and their importance to the task that runs inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lota.choices import MAX_SKIPPED_STEPS
from lota.retention import Importance
from lota.ticket import Mask
from lota.zero.calibration import CalibrationRun, Shapes, TakingPart
from lota.zero.compact.importance_sums import ImportanceSums
from lota.zero.new_tensors import class_name


class ImportanceRun(CalibrationRun):
    """As a calibration of gradients: the training script runs inside the block, and no step moves a weight.

    mask: collect the exact importance at its active entries as well.
    """

    def __init__(
        self,
        choose: Callable[[Shapes, Shapes, Shapes], TakingPart],
        mask: Mask | None = None,
        max_skipped_steps: int = MAX_SKIPPED_STEPS,
        names_adapters: bool = False,
    ) -> None:
        super().__init__("importance", choose, lambda *_: None, max_skipped_steps, names_adapters)
        self._mask = mask
        self._importance: Importance | None = None

    def prepare(self, model: Any, config: Any) -> None:
        super().prepare(model, config)
        for name in self._mask.names if self._mask is not None else ():
            if name in self.shapes and self._mask is not None and self._mask.shape(name) != self.shapes[name]:
                raise ValueError(
                    f"{name}: expected shape {self.shapes[name]}, as the model has it, got {self._mask.shape(name)} in "
                    "the mask: it is of another model"
                )

    def build(self, optimizer: Any, engine: Any) -> ImportanceSums:
        self._check_optimizer_holds(self.names, optimizer, "the importance")
        self.core = ImportanceSums(self.shapes, self._mask, self.device)
        return self.core

    def importance(self, facts: Mapping[str, Any] | None = None) -> Importance:
        """What the micro-batches gave, the same on every rank; the engine's state is released. Collective.

        facts: JSON to keep with it, what it is of.
        """
        if self._importance is None:
            engine = self._need_engine("importance()")
            about = {"class": class_name(engine.module), **(facts or {})}
            self._importance = self.core.importance(about)
            self.release()
        return self._importance

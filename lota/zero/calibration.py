"""The run behind `calibration_zero3`: which tensors take part, their scores, and where they come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lota.choices import GRADIENT_SCORES, MAX_SKIPPED_STEPS
from lota.ticket import BaseTensor
from lota.ticket.rows import Rows, span
from lota.ticket.rows import whole as all_rows
from lota.zero.block import BUCKET_NUMEL, BlockRun
from lota.zero.compact.gradient_scores import GradientScores
from lota.zero.compact.groups import connect, make_groups
from lota.zero.compact.scores import TaskVectorScores, WeightPiece, WeightScores, piece_of
from lota.zero.deepspeed import weights
from lota.zero.deepspeed.dense_state import DenseState
from lota.zero.deepspeed.optimizer import CompactOptimizer
from lota.zero.deepspeed.settings import communication_dtype
from lota.zero.deepspeed.supported import check_no_adapters
from lota.zero.fingerprints import buffer_fingerprints, frozen_identity
from lota.zero.freeze import Freeze
from lota.zero.new_tensors import new_tensors, refuse_new

Shapes = Mapping[str, tuple[int, ...]]


class TakingPart(Protocol):
    """Who takes part, as `lota.selection.candidates` finds it."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> Mapping[str, Rows]: ...
    @property
    def dense(self) -> Mapping[str, Rows]: ...


class CalibrationRun(BlockRun):
    """Scores of the eligible tensors.

    choose(trainable, model, buffers): who takes part, from full shapes by name of what may be trained, of all
    parameters and of the persistent buffers. check(shapes, rows, base): raises where selection could not work on these
    tensors; asked before anything is built (base None) and again when the base's fingerprints are known.
    names_adapters: the caller said which tensors may be trained, so adapters of PEFT may be among them.
    """

    is_sparse = False

    def __init__(
        self,
        score: str,
        choose: Callable[[Shapes, Shapes, Shapes], TakingPart],
        check: Callable[[Shapes, Mapping[str, Rows], Mapping[str, BaseTensor] | None], None],
        max_skipped_steps: int = MAX_SKIPPED_STEPS,
        names_adapters: bool = False,
    ) -> None:
        super().__init__(max_skipped_steps)
        self.score, self._choose, self._check = score, choose, check
        self._names_adapters = names_adapters
        self.optimizer_class = None if score == "task_vector" else CompactOptimizer
        self.names: tuple[str, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.model_shapes: dict[str, tuple[int, ...]] = {}
        self.rows: Mapping[str, Rows] = {}
        self.dense: dict[str, tuple[tuple[int, ...], Rows]] = {}  # shape and rows of what trains whole
        self._trained: tuple[str, ...] = ()
        self._new: dict[str, int] = {}

    def prepare(self, model: torch.nn.Module, config: Any) -> None:
        weights.check_world_sharded(model, "")
        if not self._names_adapters:
            check_no_adapters(model)
        shapes = self.model_shapes = weights.shapes(model)
        trainable = {name for name, param in model.named_parameters() if param.requires_grad}
        buffers = {name: tuple(buffer.shape) for name, buffer in weights.buffers(model).items()}
        of_trainable = {name: shape for name, shape in shapes.items() if name in trainable}
        chosen = self._choose(of_trainable, shapes, buffers)
        self.names, self.rows = chosen.names, chosen.rows
        self.shapes = {name: shapes[name] for name in self.names}
        known = buffers | shapes
        self.dense = {name: (known[name], rows) for name, rows in chosen.dense.items()}
        self._check(self.shapes, self.rows, None)
        self._new = new_tensors(model)
        whole_rows = chosen.dense
        refuse_new(self._new, model, lambda name, rows: _contains(whole_rows.get(name), rows))
        # Gradient scores look at weights that stay: there is nothing to train whole.
        whole = () if self.optimizer_class is not None else tuple(name for name in self.dense if name in shapes)
        self._trained = tuple(dict.fromkeys((*self.names, *whole)))
        self._freeze = Freeze(model, set(self._trained))
        self._groups = make_groups(dist.get_world_size())

    def weight_group(self) -> Any:
        return None

    def _pieces(self, model: torch.nn.Module, names: Collection[str]) -> list[WeightPiece]:
        reduction = self.groups.reduction
        return [
            piece_of(part.name, part.numel, part.data, reduction.shard_rank, reduction.shard_size)
            for part in weights.partitions(model)
            if part.name in names
        ]

    def build(self, optimizer: Any, engine: Any) -> Any:
        self._check_optimizer_holds(self.names, optimizer, "calibration scores")
        pieces = self._pieces(engine.module, self.shapes)
        if self.score in GRADIENT_SCORES:
            connect(self.groups.reduction, self.device)
            self.core = GradientScores(
                pieces,
                self.score,
                groups=self.groups.reduction,
                device=self.device,
                bucket_numel=min(int(optimizer.reduce_bucket_size), BUCKET_NUMEL),
                accumulates=engine.gradient_accumulation_steps() > 1 or optimizer.dtype == torch.float16,
                wire=communication_dtype(engine),
            )
        else:
            self.core = WeightScores(pieces, self.score)
        return self.core

    def built(self, engine: Any) -> None:
        super().built(engine)
        self._identify(engine.module, self._new)
        self.base_identity |= buffer_fingerprints(weights.buffers(engine.module))
        self._check(self.shapes, self.rows, {name: self.base_identity[name] for name in self.names})
        if self.score == "task_vector":
            self._check_optimizer_holds(self._trained, engine.optimizer, "calibration scores")
            pieces = self._pieces(engine.module, self._trained)
            self.core = TaskVectorScores(pieces, DenseState(engine), scored=set(self.names))

    def after_step(self, was_skipped: bool, scale_may_fall: bool) -> None:
        if self.core.is_spoilt:
            self.skipped.stop(
                self.engine.global_steps,
                self.core.not_finite(),
                cure="It is part of the score already: with gradient_accumulation_steps of 2 or more, such batches are "
                "left out. ",
            )
        super().after_step(was_skipped, scale_may_fall)

    def _identity(self) -> dict[str, Any]:
        optimizer = type(self.engine.optimizer.optimizer).__name__ if self.score == "task_vector" else "none"
        return {
            "kind": "calibration",
            "score": self.score,
            "eligible_tensors": list(self.names),
            "dense_tensors": list(self.dense),
            "optimizer": optimizer,
            **super()._identity(),
        }

    def frozen(self) -> dict[str, BaseTensor]:
        """Identity of the base's tensors that do not take part."""
        return frozen_identity(self.base_identity, self._new, {*self.names, *self.dense})

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's pieces: name, flat start, scores (fp32)."""
        self._need_engine("mask()")
        return self.core.scores()

    def report(self) -> dict[str, Any]:
        """What this rank holds, in bytes, and what was calibrated."""
        held = {"weights": self._weights_bytes(), **self.core.nbytes()}
        if self.score == "task_vector":
            held["masters_moments_gradients"] = 16 * sum(
                piece.weights.numel() for piece in self._pieces(self.engine.module, self._trained)
            )
        spans = (span(shape, self.rows.get(name, all_rows(shape))) for name, shape in self.shapes.items())
        numel = sum(stop - start for start, stop in spans)
        return {
            "score": self.score,
            "eligible": numel,
            "steps": self.engine.global_steps,
            "skipped_steps": self.engine.skipped_steps,
            "bytes_held": held,
        }


def _contains(outer: Rows | None, inner: Rows) -> bool:
    return outer is not None and outer[0] <= inner[0] and inner[1] <= outer[1]

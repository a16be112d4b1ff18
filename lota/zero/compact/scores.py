"""Calibration scores on the partitions of one rank. No DeepSpeed here.

`task_vector`: |fp32 master - base| after a dense run. `gradient`: mean |g|, `fisher`: mean g^2, `snip`: |w| * mean |g|
(the weights do not move), over global batches, where g is the mean gradient of the whole global batch after reduction,
so that nothing depends on ranks or micro batches. `magnitude`: |w|. `random`: equal scores, for selection to break by
hash.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lota.zero.checkpoint.vectors import Vector
from lota.zero.compact.layout import owned_range

_CHUNK = 1 << 22
_LOG = logging.getLogger("lota")


@dataclass(frozen=True)
class WeightPiece:
    """This rank's piece of an eligible tensor: `weights` is its real part (no padding), beginning at flat `start`."""

    name: str
    numel: int
    start: int
    weights: Tensor


class DenseOptimizer(Protocol):
    """fp32 state of a dense ZeRO-3 run by tensor name: this rank's flat padded pieces. kind: "master" or a moment."""

    def moment_dtypes(self) -> dict[str, torch.dtype]: ...
    def get(self, name: str, kind: str) -> Tensor: ...
    def gradient(self, name: str) -> Tensor | None: ...
    def put(self, name: str, kind: str, values: Tensor) -> None: ...
    def numbers(self) -> dict[str, Any]: ...
    def make_state(self, numbers: Mapping[str, Any]) -> None: ...


class TaskVectorScores:
    """Keeps the base's values in host memory and compares with the masters of a dense run, which are DeepSpeed's.

    pieces: of all tensors that train; scored: names of those that get scores (None: all).
    """

    def __init__(
        self, pieces: Sequence[WeightPiece], dense: DenseOptimizer, scored: Collection[str] | None = None
    ) -> None:
        self._pieces, self._dense = pieces, dense
        self._scored = [piece for piece in pieces if scored is None or piece.name in scored]
        self._base = {piece.name: piece.weights.detach().to("cpu", copy=True) for piece in self._scored}

    def base(self, name: str) -> Tensor:
        return self._base[name]

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        for piece in self._scored:
            master = self._dense.get(piece.name, "master")[: piece.weights.numel()]
            yield piece.name, piece.start, master - self._base[piece.name].to(master.device).float()

    is_spoilt = False

    def not_finite(self) -> dict[str, Tensor]:
        """For each tensor whether this rank's part of its gradient is not finite, before the step; bool scalars."""
        gradients = {piece.name: self._dense.gradient(piece.name) for piece in reversed(self._pieces)}
        return {
            piece.name: piece.weights.new_zeros((), dtype=torch.bool)
            if (gradient := gradients[piece.name]) is None
            else (~torch.isfinite(gradient[: piece.weights.numel()])).any()
            for piece in reversed(self._pieces)
        }

    def nbytes(self) -> dict[str, int]:
        return {"base_host": sum(base.nbytes for base in self._base.values())}

    def is_mid_step(self) -> bool:
        return False  # DeepSpeed's own gradients are not looked at; Trainers save after a step

    def numbers(self) -> dict[str, Any]:
        return {"optimizer": self._dense.numbers()}

    def vectors(self) -> list[Vector]:
        kinds = {"master": torch.float32} | self._dense.moment_dtypes()
        return [
            self._vector(piece, kind, dtype)
            for piece in self._pieces
            if piece.weights.numel()
            for kind, dtype in kinds.items()
        ]

    def _vector(self, piece: WeightPiece, kind: str, dtype: torch.dtype) -> Vector:
        count = piece.weights.numel()
        return Vector(
            f"{piece.name}.{kind}",
            piece.start,
            count,
            lambda: self._dense.get(piece.name, kind)[:count],
            lambda values: self._dense.put(piece.name, kind, values),
            dtype,
        )

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        self._dense.make_state(numbers["optimizer"])

    def restored(self, numbers: Mapping[str, Any]) -> None:
        for piece in self._pieces:
            piece.weights.copy_(self._dense.get(piece.name, "master")[: piece.weights.numel()])


class WeightScores:
    """`magnitude` and `random`: nothing is accumulated, and there is nothing to resume."""

    def __init__(self, pieces: Sequence[WeightPiece], score: str) -> None:
        self._pieces, self._score = pieces, score

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        pass

    def finish_backward(self, last: bool) -> None:
        pass

    def step(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.bool)

    def discard_gradients(self) -> None:
        pass

    is_spoilt = False

    def not_finite(self) -> dict[str, Tensor]:
        return {}  # gradients are not looked at

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        for piece in self._pieces:
            weights = piece.weights.float()
            scores = weights.abs() if self._score == "magnitude" else torch.ones_like(weights)
            yield piece.name, piece.start, scores

    def nbytes(self) -> dict[str, int]:
        return {}

    def is_mid_step(self) -> bool:
        return False

    def numbers(self) -> dict[str, Any]:
        return {}

    def vectors(self) -> list[Vector]:
        return []

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        pass

    def restored(self, numbers: Mapping[str, Any]) -> None:
        pass


def piece_of(name: str, numel: int, partition: Tensor, rank: int, size: int) -> WeightPiece:
    """The real part of `partition`, rank `rank`'s padded piece of a tensor of `numel` elements over `size` ranks."""
    start, stop = owned_range(numel, size, rank)
    return WeightPiece(name, numel, start, partition[: stop - start])

"""Calibration scores on the partitions of one rank. No DeepSpeed here.

`task_vector`: |fp32 master - base| after a dense run. `gradient`: mean |g|, `fisher`: mean g^2, `snip`: |w| * mean |g|
(the weights do not move), over global batches, where g is the mean gradient of the whole global batch after reduction,
so that nothing depends on ranks or micro batches. `magnitude`: |w|. `random`: equal scores, for selection to break by
hash.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lota.zero.checkpoint import Vector
from lota.zero.layout import owned_range
from lota.zero.reduction import GradientReducer, ReductionGroups
from lota.zero.whole import WholeGradients

SCORES = ("task_vector", "gradient", "fisher", "snip", "magnitude", "random")
GRADIENT_SCORES = ("gradient", "fisher", "snip")


@dataclass(frozen=True)
class Piece:
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

    def __init__(self, pieces: Sequence[Piece], dense: DenseOptimizer, scored: Collection[str] | None = None) -> None:
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
            else (~torch.isfinite(gradient)).any()
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

    def _vector(self, piece: Piece, kind: str, dtype: torch.dtype) -> Vector:
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

    def __init__(self, pieces: Sequence[Piece], score: str) -> None:
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


class GradientScores:
    """Accumulates |g| or g^2 of every global batch in fp32, one value per weight of the partition, and nothing else.

    accumulates: the global batch has several micro steps (or fp16 may overflow), so the sum of their gradients needs a
    second value per weight; else every reduced bucket goes straight into the score.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        score: str,
        *,
        groups: ReductionGroups,
        device: torch.device,
        bucket_numel: int,
        accumulates: bool,
        wire: torch.dtype = torch.float32,
    ) -> None:
        self._pieces, self._score, self._groups = pieces, score, groups
        self._tensor = {piece.name: tensor for tensor, piece in enumerate(pieces)}
        self._whole = WholeGradients([piece.numel for piece in pieces], groups.shard_size, bucket_numel)
        # A rank's pieces stand one after another, and so do the stretches that they are cut into.
        self._offsets = [0]
        for counts in self._whole.counts:
            self._offsets.append(self._offsets[-1] + counts[groups.shard_rank])
        self._sum = torch.zeros(self._offsets[-1], device=device)
        self._gradient = torch.zeros_like(self._sum) if accumulates else None
        self._delivered: set[int] = set()
        self._square = torch.zeros((), dtype=torch.float64, device=device)
        self._reducer = GradientReducer(
            self._whole.counts,
            bucket_numel=bucket_numel,
            groups=groups,
            deliver=self._deliver,
            device=device,
            wire=wire,
        )
        self._is_pending = False
        self.num_batches = 0
        self.is_spoilt = False

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Hand a whole tensor's gradient (any float dtype) to the reduction."""
        self._is_pending = True
        flat = gradient.reshape(-1)
        for slot in reversed(self._whole.slots[self._tensor[name]]):  # the order of buckets
            self._reducer.add(slot, self._whole.writer(slot, flat))

    def finish_backward(self, last: bool) -> None:
        if self._gradient is None and not last:
            raise ValueError(
                "a backward ended that is not the last of its step, but the configuration says "
                "gradient_accumulation_steps: 1; set it to the number of micro batches, so that their gradients are "
                "summed before they are scored"
            )
        self._reducer.finish(last)
        self._delivered.clear()

    def discard_gradients(self) -> None:
        """Forget the gradients of the global batch so far (`zero_grad`)."""
        if not self._is_pending:
            return
        if self._gradient is None:
            raise ValueError("zero_grad() between backward and step: this batch was scored already; call step() first")
        self._is_pending = False
        self._reducer.discard()
        self._gradient.zero_()

    def _deliver(self, slots: range, values: Tensor) -> None:
        where = slice(self._offsets[slots.start], self._offsets[slots.stop])
        if self._gradient is not None:
            self._gradient[where].add_(values)
            return
        if not self._delivered.isdisjoint(slots):
            name = self._pieces[self._whole.stretches[slots.start].tensor].name
            raise ValueError(
                f"{name} got gradients twice in one backward (weights shared under reentrant activation "
                "checkpointing). Use non-reentrant checkpointing, or gradient_accumulation_steps > 1."
            )
        self._delivered.update(slots)
        self._add(where, values)

    def _add(self, where: slice, gradient: Tensor) -> None:
        for first in range(where.start, where.stop, 1 << 22):
            last = min(first + (1 << 22), where.stop)
            piece = gradient[first - where.start : last - where.start]
            self._square += piece.double().square_().sum()
            self._sum[first:last].add_(piece * piece if self._score == "fisher" else piece.abs())

    def step(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        """End of a global batch: add its gradient to the score. Returns the gradient's norm and whether it is not
        finite: it was skipped then, unless it went straight into the score, which `is_spoilt` after that. Collective.
        """
        self._is_pending = False
        if self._gradient is not None:
            finite = torch.isfinite(self._gradient).all().to(torch.int32)
            if self._groups.world is not None:
                dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=self._groups.world)
            if bool(finite):
                self._add(slice(0, self._sum.numel()), self._gradient.div_(loss_scale))
            self._gradient.zero_()
            skip = finite == 0
        square = self._square.clone()
        if self._groups.shard is not None:
            dist.all_reduce(square, group=self._groups.shard)
        self._square.zero_()
        if self._gradient is None:
            skip = ~torch.isfinite(square)
            self.is_spoilt = self.is_spoilt or bool(skip)
        self.num_batches += 1 if not bool(skip) else 0
        return square.sqrt(), skip

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        if self.num_batches == 0:
            raise ValueError(
                f"score {self._score!r} needs at least one global batch, and none ended inside the block: train "
                "at least one step"
            )
        for piece, sums in self._sums():
            mean = sums / self.num_batches
            yield (
                piece.name,
                piece.start,
                mean * piece.weights.to(mean.device).float().abs() if self._score == "snip" else mean,
            )

    def not_finite(self) -> dict[str, Tensor]:
        """For each tensor whether this rank's part of the batch's gradient is not finite, or of the sums where
        gradients are not kept; bool scalars."""
        values = self._sum if self._gradient is None else self._gradient
        parts = values.split([piece.weights.numel() for piece in self._pieces])
        return {
            piece.name: (~torch.isfinite(part)).any() for piece, part in zip(reversed(self._pieces), reversed(parts))
        }

    def is_mid_step(self) -> bool:
        return self._is_pending

    def numbers(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches}

    def vectors(self) -> list[Vector]:
        return [
            Vector.of(f"{piece.name}.{self._score}", piece.start, sums) for piece, sums in self._sums() if sums.numel()
        ]

    def _sums(self) -> Iterator[tuple[Piece, Tensor]]:
        """Every piece with its sums (a view)."""
        return zip(self._pieces, self._sum.split([piece.weights.numel() for piece in self._pieces]))

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        pass

    def restored(self, numbers: Mapping[str, Any]) -> None:
        self.num_batches = numbers["num_batches"]

    def nbytes(self) -> dict[str, int]:
        gradient = 0 if self._gradient is None else self._gradient.nbytes
        return {"scores": self._sum.nbytes, "gradient": gradient, "buffers": self._reducer.buffer_bytes}


def piece_of(name: str, numel: int, partition: Tensor, rank: int, size: int) -> Piece:
    """The real part of `partition`, rank `rank`'s padded piece of a tensor of `numel` elements over `size` ranks."""
    start, stop = owned_range(numel, size, rank)
    return Piece(name, numel, start, partition[: stop - start])

"""Calibration scores of the gradient kind, accumulated batch by batch: |g|, g^2, |w| * |g|. No DeepSpeed here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.zero.checkpoint.vectors import Vector
from lota.zero.compact.reduction import GradientReducer, ReductionGroups
from lota.zero.compact.scores import WeightPiece
from lota.zero.compact.step_gradients import StepGradients
from lota.zero.compact.whole_gradients import WholeGradients

_CHUNK = 1 << 22
_LOG = logging.getLogger("lota")

class GradientScores:
    """Accumulates |g| or g^2 of every global batch in fp32, one value per weight of the partition, and nothing else.

    g is the sum of all gradients between two steps, however many backwards they came from, and |a + b| cannot be had
    from |a| and |b|. A sum of its own takes a second value per weight: `accumulates` says that it will be needed (the
    global batch has several micro batches, or fp16 may overflow). Otherwise the first batch shows it for nothing: as
    long as there is no score, the score's own memory holds the sum, and becomes |g| in the step. If that batch took one
    backward, later ones go straight into the score, piece by piece as they are reduced, and a backward too many is an
    error; if it took several, the second value is made then.
    """

    def __init__(
        self,
        pieces: Sequence[WeightPiece],
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
        self._sum = torch.zeros(self._offsets[-1], dtype=torch.float32, device=device)
        self._gradient = torch.zeros_like(self._sum) if accumulates else None
        self._square = torch.zeros((), dtype=torch.float64, device=device)
        self._reducer: GradientReducer | None = None
        if not groups.is_one_rank:
            self._reducer = GradientReducer(
                self._whole.counts,
                bucket_numel=bucket_numel,
                groups=groups,
                deliver=self._deliver,
                device=device,
                wire=wire,
                by_owner=True,
            )
        self._gradients = StepGradients(self._reducer)
        self._delivered: set[int] = set()
        self._twice: str | None = None
        self.num_batches = 0
        self.is_spoilt = False

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Hand a whole tensor's gradient (any float dtype) to the reduction."""
        self._gradients.arrive()
        flat, slots = gradient.reshape(-1), self._whole.slots[self._tensor[name]]
        if self._reducer is None:
            self._deliver(slots, flat)
            return
        for slot in reversed(slots):  # the order of buckets
            self._reducer.add_rows(slot, self._whole.writer(slot, flat))

    def finish_backward(self, last: bool) -> None:
        """After every backward: reduce what is left. Collective.

        ValueError on every rank if a gradient arrived twice before a step, and the batches before showed one backward.
        """
        self._gradients.finish_backward(last)
        if self._twice is not None and not self._sums_up:
            # Raised here, where all ranks are, and not where it was noticed: others may still be in their backward.
            raise ValueError(
                f"{self._twice} received a second gradient before engine.step() in global batch "
                f"{self.num_batches + 1}, but the batches before had one backward each, so this one's first gradient "
                "was scored already. Where some batches take several backwards, or use a weight twice under reentrant "
                "activation checkpointing, set gradient_accumulation_steps to 2 or more, which keeps the sum (with "
                "engine.step() after every backward); or add the losses up and call backward once"
            )

    def discard_gradients(self) -> None:
        """Forget the gradients of the global batch so far (`zero_grad`)."""
        if self._gradients.is_pending and not self._sums_up:
            raise ValueError("zero_grad() between backward and step: this batch was scored already; call step() first")
        if self._gradients.discard():
            self._summed().zero_()
            self._forget_delivered()

    @property
    def _sums_up(self) -> bool:
        """Whether gradients are summed before they are scored."""
        return self._gradient is not None or self.num_batches == 0

    def _summed(self) -> Tensor:
        """Where the sum of the batch's gradients stands, if it is kept."""
        return self._sum if self._gradient is None else self._gradient

    def _forget_delivered(self) -> None:
        self._delivered.clear()
        self._twice = None

    def _deliver(self, slots: range, values: Tensor) -> None:
        """Take this rank's entries of consecutive slots."""
        if self._gradient is None:
            if self._twice is None and not self._delivered.isdisjoint(slots):
                self._twice = self._pieces[self._whole.stretches[slots.start].tensor].name
            self._delivered.update(slots)
        where = slice(self._offsets[slots.start], self._offsets[slots.stop])
        if self._sums_up:
            _add(self._summed()[where], values)
        elif self._twice is None:
            self._score_gradient(where.start, values)

    def _score_gradient(self, start: int, gradient: Tensor) -> None:
        """Add |g| or g^2 to the score's entries from `start` on; where the score holds g itself, turn it into that."""
        is_in_place = gradient is self._sum
        for first in range(0, gradient.numel(), _CHUNK):
            piece = gradient[first : first + _CHUNK].float()
            self._square += piece.double().square_().sum()
            if is_in_place:
                piece.square_() if self._score == "fisher" else piece.abs_()
            else:
                target = self._sum[start + first : start + first + piece.numel()]
                target.add_(piece * piece if self._score == "fisher" else piece.abs())

    def step(self, loss_scale: float) -> tuple[Tensor, Tensor]:
        """End of a global batch: add its gradient to the score. Returns the gradient's norm and whether it is not
        finite: it was skipped then, unless it went straight into the score, which `is_spoilt` after that. Collective.
        """
        self._gradients.complete()
        sums_up = self._sums_up
        if sums_up:
            skip = self._score_sum(loss_scale)
        square = self._square.clone()
        if self._groups.shard is not None:
            dist.all_reduce(square, group=self._groups.shard)
        self._square.zero_()
        if not sums_up:
            skip = ~torch.isfinite(square)
            self.is_spoilt = self.is_spoilt or bool(skip)
        if sums_up and self._gradient is None and (self._gradients.num_backwards > 1 or self._twice is not None):
            self._start_to_accumulate()
        self._gradients.end_step()
        self._forget_delivered()
        self.num_batches += 1 if not bool(skip) else 0
        return square.sqrt(), skip

    def _score_sum(self, loss_scale: float) -> Tensor:
        """Score the batch's summed gradient if it is finite on every rank, and forget it; whether it was not."""
        summed = self._summed()
        finite = torch.ones((), dtype=torch.bool, device=summed.device)
        for first in range(0, summed.numel(), _CHUNK):
            finite &= torch.isfinite(summed[first : first + _CHUNK]).all()
        agreed = finite.to(torch.int32)
        if self._groups.world is not None:
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._groups.world)
        is_scored = bool(agreed)
        if is_scored:
            self._score_gradient(0, summed.div_(loss_scale))
        if not is_scored or self._gradient is not None:
            summed.zero_()
        return agreed == 0

    def _start_to_accumulate(self) -> None:
        """The first batches took several backwards, so the next ones will. The same on every rank."""
        self._gradient = torch.zeros_like(self._sum)
        if dist.get_rank() == 0:
            _LOG.warning(
                "gradient_accumulation_steps is 1, but weights received several gradients before the first step (in %d "
                "backwards): they are summed before they are scored, in 4 more bytes a weight (%.1f MiB on this rank)",
                *(self._gradients.num_backwards, self._gradient.nbytes / 2**20),
            )

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        if self.num_batches == 0:
            raise ValueError(
                f"score {self._score!r} needs at least one global batch, and none ended inside the block: train "
                "at least one step"
            )
        self._check_nothing_pending()
        for piece, sums in self._sums():
            mean = sums / self.num_batches
            yield (
                piece.name,
                piece.start,
                mean * piece.weights.to(mean.device).float().abs() if self._score == "snip" else mean,
            )

    def _check_nothing_pending(self) -> None:
        """ValueError where a part of a batch is in the score already; one that is not is left out with a warning."""
        if not self._gradients.is_pending:
            return
        if not self._sums_up:
            raise ValueError("a backward without engine.step() is in the score already: call step() before mask()")
        if dist.get_rank() == 0:
            backwards = self._gradients.num_backwards
            _LOG.warning("the gradients of %d backwards that no step followed are not in the score", backwards)

    def not_finite(self) -> dict[str, Tensor]:
        """For each tensor whether this rank's part of the batch's gradient is not finite, or of the sums where
        gradients are not kept; bool scalars."""
        parts = self._summed().split([piece.weights.numel() for piece in self._pieces])
        return {
            piece.name: (~torch.isfinite(part)).any() for piece, part in zip(reversed(self._pieces), reversed(parts))
        }

    def is_mid_step(self) -> bool:
        return self._gradients.is_pending

    def numbers(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches, "accumulates": self._gradient is not None}

    def vectors(self) -> list[Vector]:
        return [
            Vector.of(f"{piece.name}.{self._score}", piece.start, sums) for piece, sums in self._sums() if sums.numel()
        ]

    def _sums(self) -> Iterator[tuple[WeightPiece, Tensor]]:
        """Every piece with its sums (a view)."""
        return zip(self._pieces, self._sum.split([piece.weights.numel() for piece in self._pieces]))

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        pass

    def restored(self, numbers: Mapping[str, Any]) -> None:
        self.num_batches = numbers["num_batches"]
        # What the first batch showed; a checkpoint of an earlier version does not know it.
        if numbers.get("accumulates") and self._gradient is None:
            self._gradient = torch.zeros_like(self._sum)

    def nbytes(self) -> dict[str, int]:
        gradient = 0 if self._gradient is None else self._gradient.nbytes
        return {"scores": self._sum.nbytes, "gradient": gradient, "buffers": self._gradients.buffer_bytes}


def _add(total: Tensor, values: Tensor) -> None:
    """`total += values` in fp32. On CPUs a piece at a time: torch adds mixed dtypes there several times slower."""
    if values.dtype == total.dtype or total.device.type != "cpu":
        total.add_(values)
        return
    for first in range(0, values.numel(), 1 << 20):
        piece = values[first : first + (1 << 20)].float()
        total[first : first + piece.numel()].add_(piece)

"""Sparse training on the partitions of one rank: compact gradients, clipping, the step, the ticket. No DeepSpeed
here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.kernels import gather, gather_add_, squared_norm
from lota.ticket import Mask
from lota.zero.checkpoint.vectors import Vector
from lota.zero.compact.layout import Slot, owned_range, partition_numel
from lota.zero.compact.pulling import Pulling, Retained
from lota.zero.compact.reduction import GradientReducer, ReductionGroups
from lota.zero.compact.state import CompactState
from lota.zero.compact.step_gradients import StepGradients
from lota.zero.compact.update import Update
from lota.zero.compact.whole_gradients import WholeGradients


@dataclass(frozen=True)
class TensorGroup:
    """Tensors whose padded pieces stand one after another in the flat buffer `weights` of this rank.

    settings: position of their parameter group in the caller's optimizer.
    """

    names: tuple[str, ...]
    numels: tuple[int, ...]
    weights: Tensor
    settings: int


class SparseTraining:
    """Compact state of all tensors of a mask, fed with dense gradients one tensor at a time. The mask is not kept.

    device: where gradients appear. bucket_numel: most entries of a reduction bucket. reduce_every: micro_step or step.
    gradient_reduction: compact, or dense, which reduces whole gradients and compacts what this rank owns as it arrives,
    for which it needs only its share of the index; not every step, which would keep whole gradients. wire: dtype in
    which gradients are sent, fp32 or bf16. retained: what the run is pulled to, in 4 bytes an active entry.
    """

    def __init__(
        self,
        tensor_groups: Sequence[TensorGroup],
        mask: Mask,
        update: Update,
        *,
        groups: ReductionGroups,
        device: torch.device,
        bucket_numel: int,
        reduce_every: str,
        gradient_reduction: str = "compact",
        wire: torch.dtype = torch.float32,
        retained: Retained | None = None,
    ) -> None:
        assert not (reduce_every == "step" and gradient_reduction == "dense")
        self.update, self.groups, self.device = update, groups, device
        self.tensor_groups = tuple(tensor_groups)
        origins: dict[str, int] = {}
        if update.rounding_seed is not None:
            self.tensor_groups = _one_by_one(self.tensor_groups, groups.shard_size)
            origins = _origins(mask, groups.shard_rank, groups.shard_size)
        place_of_index = None if gradient_reduction == "dense" else device
        self.states = [
            CompactState(
                *(g.names, g.numels, g.weights, mask.chunks, groups.shard_rank, groups.shard_size, place_of_index),
                group=g.settings,
                origin=origins.get(g.names[0], 0),
            )
            for g in self.tensor_groups
        ]
        for state in self.states:
            for name in update.moment_names:
                state.add_moment(name)
        self.pulling = None if retained is None else Pulling(retained, self.states, mask)
        update.pulling = self.pulling
        place = {slot.name: (state, slot) for state in self.states for slot in state.layout.slots}
        # One order for all groups of tensors, the mask's, so that every rank sends buckets in the same order.
        self._place = {name: place[name] for name in mask.names if name in place}
        self._position = {name: position for position, name in enumerate(self._place)}
        self._order = list(self._place.values())
        self.wire = wire
        self._whole: WholeGradients | None = None
        if gradient_reduction == "dense" and not groups.is_one_rank:
            self._whole = WholeGradients([slot.numel for _, slot in self._order], groups.shard_size, bucket_numel)
            self._entries = self._entries_of_stretches()
        self._reducer: GradientReducer | None = None
        if not groups.is_one_rank:
            self._reducer = GradientReducer(
                [slot.counts for _, slot in self._order] if self._whole is None else self._whole.counts,
                bucket_numel=bucket_numel,
                groups=groups,
                deliver=self._deliver if self._whole is None else self._deliver_whole,
                device=device,
                reduce_every=reduce_every,
                wire=wire,
                by_owner=gradient_reduction == "dense",
            )
        self._gradients = StepGradients(self._reducer)
        self.num_steps = 0
        self._num_skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.extra: Callable[[], list[Vector]] = list
        """What else a checkpoint holds: buffers, which keep dtypes of their own."""

    def slot(self, name: str) -> tuple[CompactState, Slot]:
        """The state that holds a tensor, and its place there."""
        return self._place[name]

    def _deliver(self, slots: range, values: Tensor) -> None:
        # values: fp32 [own entries of all these slots], slot after slot
        for position in slots:
            state, slot = self._order[position]
            count = slot.counts[self.groups.shard_rank]  # active entries of this tensor that this rank owns
            state.accumulate(slot, values[:count])
            values = values[count:]

    def _deliver_whole(self, slots: range, values: Tensor) -> None:
        """Compact whole reduced gradients: of each stretch, the active entries that this rank owns."""
        assert self._whole is not None
        for position in slots:
            stretch = self._whole.stretches[position]
            state, slot = self._order[stretch.tensor]
            count = stretch.counts[self.groups.shard_rank]  # all entries of the stretch in this rank's partition
            entries = self._entries[position]  # the active ones among them, as a slice of the compact vectors
            positions = state.local_index.positions(entries.start, entries.stop)
            piece = values[:count].to(positions.device)  # [count], whole gradients from flat `offset` on
            state.gradient[entries].add_(piece.index_select(0, positions.sub_(slot.local_origin + stretch.offset)))
            values = values[count:]

    def _entries_of_stretches(self) -> list[slice]:
        """Which of this rank's compact entries lie in each stretch of whole gradients."""
        assert self._whole is not None
        found: list[slice] = []
        for (state, slot), slots in zip(self._order, self._whole.slots, strict=True):
            entries, index = state.entries(slot), state.local_index
            # local position at which each stretch begins; entries before it belong to earlier stretches
            edges = [slot.local_origin + self._whole.stretches[position].offset for position in slots]
            where = torch.tensor(edges, dtype=torch.int64, device=index.base.device)
            bounds = [*index.entries_before(where).tolist(), entries.stop]
            found += [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        return found

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """Hand a tensor's gradient (any float dtype, whole tensor) to the reduction, compacted first if it can be."""
        self._gradients.arrive()
        reducer, flat = self._reducer, gradient.reshape(-1)  # [numel of the whole tensor]
        if reducer is None:
            self._accumulate(name, flat)
            return
        if self._whole is not None:
            for position in reversed(self._whole.slots[self._position[name]]):  # the order of buckets
                reducer.add_rows(position, self._whole.writer(position, flat))
            return
        state, slot = self._place[name]
        assert state.full_index is not None
        full_index = state.full_index
        stop = slot.full_start + slot.num_active
        span: dict[str, Any] = {"start": slot.full_start, "stop": stop, "origin": slot.full_origin}

        def write(out: Tensor, is_first: bool) -> None:
            # out: fp32 [num_active of the tensor, over all owners]
            if is_first:
                gather(flat, full_index, out=out, **span)
            else:
                gather_add_(out, flat, full_index, **span)

        reducer.add(self._position[name], write)

    def _accumulate(self, name: str, flat: Tensor) -> None:
        """One rank owns every entry: no bucket, the accumulator itself."""
        state, slot = self._place[name]
        index = state.local_index if state.full_index is None else state.full_index
        entries = state.entries(slot)
        span: dict[str, Any] = {"start": slot.full_start, "stop": slot.full_start + slot.num_active}
        span["origin"] = slot.full_origin
        if index.base.device == state.gradient.device:
            gather_add_(state.gradient[entries], flat.to(index.base.device), index, **span)
        else:  # offloaded weights: gathered where the gradient is, so that only active entries move
            state.accumulate(slot, gather(flat, index, **span))

    def finish_backward(self, last: bool) -> None:
        """After every backward (`last`: of the step): reduce and accumulate what is left. Collective."""
        self._gradients.finish_backward(last)

    def step(self, settings: Sequence[dict[str, Any]], clip: float, loss_scale: float) -> tuple[Tensor, Tensor]:
        """Clip by the norm over active entries, update, scatter, zero the gradients. Collective.

        settings: the optimizer's parameter groups. clip: largest norm, 0 for none. Returns the norm of the unscaled
        gradient before clipping and the skip flag (a non-finite norm on any rank), as device scalars; a skipped step
        changes nothing but the gradients.
        """
        self._gradients.complete()
        norm = self._squared_norm().sqrt() / loss_scale  # float64 [], never read on the host
        skip = ~torch.isfinite(norm)
        if self.groups.replica is not None:
            # Replicas hold the same sums; agreeing makes sure that they also draw the same conclusion.
            agreed = torch.stack((skip.double(), torch.where(skip, 0.0, norm)))  # float64 [2]
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.groups.world)
            skip = agreed[0] > 0
            norm = torch.where(skip, torch.inf, agreed[1])
        scale = torch.full_like(norm, 1.0 / loss_scale)  # gradients are unscaled and clipped by one factor, in the step
        if clip > 0:
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        where = self.states[0].master.device  # one for all: the accelerator, or the host that weights are offloaded to
        self.update.step(self.states, settings, scale.float().to(where), skip.to(where))
        for state in self.states:
            state.gradient.zero_()
        self._gradients.end_step()
        self.num_steps += 1
        self._num_skipped += skip
        return norm, skip

    def _squared_norm(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for state in self.states:
            total += squared_norm(state.gradient).to(self.device)
        if self.groups.shard is not None:
            dist.all_reduce(total, group=self.groups.shard)
        return total

    def not_finite(self) -> dict[str, Tensor]:
        """For each tensor whether this rank's part of its gradient is not finite, before the step: bool scalars on the
        device. In the order of backward, roughly. Collective where the gradients still have to be sent."""
        self._gradients.complete()
        return {
            name: (~torch.isfinite(state.gradient[state.entries(slot)])).any().to(self.device)
            for name, (state, slot) in reversed(self._place.items())
        }

    def discard_gradients(self) -> None:
        """Forget the gradients of the step so far (`zero_grad`)."""
        if self._gradients.discard():
            for state in self.states:
                state.gradient.zero_()

    def current_values(self, name: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """This rank's values of a tensor's active entries (bits of the weights, or fp32 masters) and the base's."""
        state, slot = self.slot(name)
        entries = state.entries(slot)
        base = state.base_values[entries]
        if dtype == torch.float32:
            return state.master[entries].cpu(), base
        return state.values(entries.start, entries.stop).cpu(), base

    def is_mid_step(self) -> bool:
        return self._gradients.is_pending

    def numbers(self) -> dict[str, Any]:
        """Counts that a checkpoint keeps, and what the update keeps beside its moments."""
        update = self.update.numbers(self.states)
        numbers = {"steps": self.num_steps, "skipped": self.num_skipped(), "update": update}
        return numbers if self.pulling is None else numbers | {"pull": self.pulling.numbers()}

    def vectors(self) -> list[Vector]:
        """Masters and moments of this rank's active entries, tensor by tensor."""
        vectors = []
        for name, (state, slot) in self._place.items():
            entries = state.entries(slot)
            start = sum(slot.counts[: self.groups.shard_rank])
            if entries.stop > entries.start:
                kinds = {"master": state.master} | self.update.moments(state)
                vectors += [Vector.of(f"{name}.{kind}", start, kinds[kind][entries]) for kind in kinds]
        return vectors + self.extra()

    def prepare_restore(self, numbers: Mapping[str, Any], keys: set[str]) -> None:
        self.update.prepare_restore(self.states, numbers["update"])
        if self.pulling is not None:
            self.pulling.restore(numbers["pull"], self.states[0].master.device)

    def restored(self, numbers: Mapping[str, Any]) -> None:
        """The weights follow the masters, as after a step."""
        self.update.write_weights(self.states)
        self.num_steps = numbers["steps"]
        self._num_skipped.fill_(numbers["skipped"])

    def num_skipped(self) -> int:
        return int(self._num_skipped)

    @property
    def num_reductions(self) -> int:
        """How often gradients were reduced: once a backward, or once a step."""
        return self._gradients.num_reductions

    def bytes_sent(self) -> int:
        return self._gradients.bytes_sent

    def buffer_bytes(self) -> int:
        return self._gradients.buffer_bytes

    def nbytes(self) -> dict[str, int]:
        """Bytes this rank holds beside the weights, by kind."""
        total: dict[str, int] = {}
        for state in self.states:
            for kind, size in state.nbytes().items():
                total[kind] = total.get(kind, 0) + size
        total["moments"] += self.update.nbytes()
        return total if self.pulling is None else total | self.pulling.nbytes()


def _one_by_one(tensor_groups: Sequence[TensorGroup], size: int) -> tuple[TensorGroup, ...]:
    """Every tensor as a group of its own. A kernel counts the places of stochastic rounding from one origin, and the
    pieces that stand one after another in a buffer have one each."""
    single = []
    for group in tensor_groups:
        pieces = group.weights.split([partition_numel(numel, size) for numel in group.numels])
        for name, numel, piece in zip(group.names, group.numels, pieces, strict=True):
            single.append(TensorGroup((name,), (numel,), piece, group.settings))
    return tuple(single)


def _origins(mask: Mask, rank: int, size: int) -> dict[str, int]:
    """Where the rank's piece of each tensor begins in the concatenation of all tensors that train, in the mask's order,
    as `lota.optim` counts them."""
    origins, total = {}, 0
    for name in mask.names:
        if mask.active(name):
            origins[name] = total + owned_range(mask.numel(name), size, rank)[0]
            total += mask.numel(name)
    return origins

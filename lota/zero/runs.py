"""The runs behind the two blocks: what they prepare, build inside the engine, and deliver."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lota.ticket import BaseTensor, Mask, TicketWriter
from lota.ticket.fingerprint import fingerprint_at
from lota.zero import engine as engines
from lota.zero.base import dtype_name, fingerprints
from lota.zero.frozen import Freeze
from lota.zero.groups import BlockGroups, check_shard_group_size, make_groups
from lota.zero.layout import owned_range
from lota.zero.scores import GRADIENT_SCORES, GradientScores, Piece, TaskVectorScores, WeightScores, piece_of
from lota.zero.sparse import SparseTraining
from lota.zero.update import choose_update

_BUCKET_NUMEL = 1 << 22


class _Run:
    """Common to both: one trainable engine per block, the model's flags, the base's identity."""

    is_sparse: bool
    optimizer_class: type[Any] | None

    def __init__(self) -> None:
        self.engine: Any = None
        self.base: dict[str, BaseTensor] = {}
        self._freeze: Freeze | None = None
        self._groups: BlockGroups | None = None
        self._was_built = False

    def _claim(self) -> None:
        if self._freeze is not None:
            raise ValueError(
                "a second trainable engine was built in one lota block; give every engine a block of its own"
            )

    @property
    def groups(self) -> BlockGroups:
        assert self._groups is not None
        return self._groups

    @property
    def device(self) -> torch.device:
        return torch.device(get_accelerator().current_device_name())

    def weight_group(self) -> Any:
        return self.groups.weights

    def built(self, engine: Any) -> None:
        self.engine, self._was_built = engine, True

    def close(self, has_failed: bool) -> None:
        """End of the block."""
        if self._freeze is not None:
            self._freeze.restore()
        if not self._was_built and not has_failed:
            raise ValueError(
                "the lota block ended and no trainable DeepSpeed engine was built in it, so nothing was "
                "calibrated or trained sparsely. "
                "Call deepspeed.initialize(...) or trainer.train() inside the block, with a ZeRO-3 configuration."
            )

    def _need_engine(self, what: str) -> Any:
        if self.engine is None:
            raise ValueError(f"{what} needs the engine of the block, and none was built yet: train first")
        return self.engine

    def _fingerprints(
        self, model: torch.nn.Module, correction: Mapping[str, int] | None = None
    ) -> dict[str, BaseTensor]:
        reduction = self.groups.reduction
        return fingerprints(
            engines.partitions(model),
            size_of=lambda part: reduction.shard_size,
            rank_of=lambda part: reduction.shard_rank,
            group=reduction.shard,
            device=self.device,
            correction=correction,
        )

    def _weights_bytes(self) -> int:
        return sum(part.data.nbytes for part in engines.partitions(self._need_engine("report").module))


class CalibrationRun(_Run):
    """Scores of the eligible tensors. eligible: full shapes by name -> names in order."""

    is_sparse = False

    def __init__(self, score: str, eligible: Callable[[Mapping[str, tuple[int, ...]]], Sequence[str]]) -> None:
        super().__init__()
        self.score, self._eligible = score, eligible
        self.optimizer_class = None if score == "task_vector" else engines.CompactOptimizer
        self.names: tuple[str, ...] = ()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.core: Any = None

    def prepare(self, model: torch.nn.Module, config: Any) -> None:
        self._claim()
        engines.check_world_sharded(model)
        shapes = engines.shapes(model)
        trainable = {name for name, param in model.named_parameters() if param.requires_grad}
        self.names = tuple(self._eligible({name: shape for name, shape in shapes.items() if name in trainable}))
        self.shapes = {name: shapes[name] for name in self.names}
        self._freeze = Freeze(model, set(self.names))
        self._groups = make_groups(dist.get_world_size())

    def weight_group(self) -> Any:
        return None

    def _pieces(self, model: torch.nn.Module) -> list[Piece]:
        reduction = self.groups.reduction
        return [
            piece_of(part.name, part.numel, part.data, reduction.shard_rank, reduction.shard_size)
            for part in engines.partitions(model)
            if part.name in self.shapes
        ]

    def build(self, optimizer: Any, engine: Any) -> Any:
        pieces = self._pieces(engine.module)
        if self.score in GRADIENT_SCORES:
            self.core = GradientScores(
                pieces,
                self.score,
                groups=self.groups.reduction,
                device=self.device,
                bucket_numel=min(int(optimizer.reduce_bucket_size), _BUCKET_NUMEL),
                accumulates=engine.gradient_accumulation_steps() > 1 or optimizer.dtype == torch.float16,
            )
        else:
            self.core = WeightScores(pieces, self.score)
        return self.core

    def built(self, engine: Any) -> None:
        super().built(engine)
        self.base = self._fingerprints(engine.module)
        if self.score == "task_vector":
            self.core = TaskVectorScores(self._pieces(engine.module), engines.master_of(engine))

    def scores(self) -> Iterator[tuple[str, int, Tensor]]:
        """This rank's pieces: name, flat start, scores (fp32)."""
        self._need_engine("mask()")
        return self.core.scores()

    def release(self) -> None:
        """Drop scores and the engine."""
        self.core = self.engine = None

    def report(self) -> dict[str, Any]:
        """What this rank holds, in bytes, and what was calibrated."""
        held = {"weights": self._weights_bytes(), **self.core.nbytes()}
        if self.score == "task_vector":
            held["masters_moments_gradients"] = 16 * sum(
                piece.weights.numel() for piece in self._pieces(self.engine.module)
            )
        numel = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return {"score": self.score, "eligible": numel, "steps": self.engine.global_steps, "bytes_held": held}


class SparseRun(_Run):
    """Sparse training on a mask."""

    is_sparse = True
    optimizer_class = engines.SparseOptimizer

    def __init__(self, mask: Mask, *, shard_group_size: int | None, once_per_step: bool) -> None:
        super().__init__()
        self.mask, self._shard_group_size, self._once_per_step = mask, shard_group_size, once_per_step
        self.core: SparseTraining | None = None

    @property
    def _training(self) -> SparseTraining:
        self._need_engine("the ticket")
        assert self.core is not None
        return self.core

    def prepare(self, model: torch.nn.Module, config: Any) -> None:
        self._claim()
        size = check_shard_group_size(self._shard_group_size, dist.get_world_size())
        parameters = dict(model.named_parameters())
        shapes = engines.shapes(model)
        _check_same_on_all_ranks(self.mask.digest, self.device)
        for name in self.mask.names:
            if name not in shapes:
                close = difflib.get_close_matches(name, shapes, 1)
                raise ValueError(
                    f"the mask names {name}, which the model does not have"
                    + (f"; did you mean {close[0]}?" if close else "")
                )
            self.mask.check_base(name, shapes[name], dtype_name(_engine_dtype(config, parameters[name].dtype)), None)
            if self.mask.active(name) and not parameters[name].requires_grad:
                raise ValueError(
                    f"the mask trains {name}, but its requires_grad is False; set it to True or leave the tensor "
                    "out of the mask"
                )
        active = {name for name in self.mask.names if self.mask.active(name)}
        if not active:
            raise ValueError("the mask has no active entry, so there is nothing to train")
        self._freeze = Freeze(model, active)
        self._groups = make_groups(size)

    def build(self, optimizer: Any, engine: Any) -> SparseTraining:
        tensor_groups = engines.trainable_groups(optimizer)
        held = {name for group in tensor_groups for name in group.names}
        missing = [name for name in self.mask.names if self.mask.active(name) and name not in held]
        if missing:
            raise ValueError(
                f"the mask trains {missing[0]}"
                + (f" and {len(missing) - 1} more tensors" if missing[1:] else "")
                + ", but the optimizer was not given them; pass model.parameters()"
            )
        self.base = self._fingerprints(engine.module)
        for name in self.mask.names:
            tensor = self.base[name]
            self.mask.check_base(name, self.mask.shape(name), tensor.dtype, tensor.fingerprint)
        self.core = SparseTraining(
            tensor_groups,
            self.mask,
            choose_update(optimizer.optimizer, tensor_groups[0].weights.device),
            groups=self.groups.reduction,
            device=self.device,
            bucket_numel=min(int(optimizer.reduce_bucket_size), _BUCKET_NUMEL),
            once_per_step=self._once_per_step,
        )
        return self.core

    def report(self) -> dict[str, Any]:
        """What this rank holds and sent, in bytes, against dense ZeRO-3 AdamW with fp32 gradients; counts and steps."""
        training, reduction = self._training, self.groups.reduction
        shards = reduction.shard_size
        trained = sum(self.mask.numel(name) for name in self.mask.names)
        local = [state.layout.local_active for state in training.states]
        return {
            "num_active": self.mask.num_active,
            "eligible": self.mask.eligible,
            "density": self.mask.density,
            "num_active_this_rank": sum(local),
            "update": training.update.name,
            "shard_group_size": shards,
            "steps": training.num_steps,
            "skipped_steps": training.num_skipped(),
            "bytes_held": {
                "weights": self._weights_bytes(),
                **training.nbytes(),
                "bucket": training.bucket_bytes(),
                "mask_host": self.mask.nbytes,
            },
            "bytes_held_dense": {
                "weights": self._weights_bytes(),
                "masters_moments_gradients": 16 * -(-trained // shards),
            },
            "bytes_sent": training.bytes_sent(),
            "bytes_sent_dense": training.num_reductions * 4 * trained * (1 if shards > 1 else 0),
            "reductions": training.num_reductions,
        }

    def save_ticket(
        self,
        path: str | Path,
        provenance: Mapping[str, Any] | None = None,
        *,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> dict[str, Any]:
        """Verify that no frozen bit of the model moved, then write the ticket. Collective over the world; rank 0
        writes.

        dtype: None stores the weights' own bits, torch.float32 the masters. Returns counts and bytes on every rank.
        Raises RuntimeError where a frozen entry changed (a fault, or a script that wrote into the weights), and
        ValueError or OSError where the ticket cannot be written; then nothing is left at `path`.
        """
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype must be None (the weights' own) or torch.float32 (the masters), got {dtype}")
        training = self._training
        self._check_frozen(training)
        is_writer = dist.get_rank() == 0
        outcome: list[Any] = [None]
        writer: TicketWriter | None = None
        if is_writer:
            try:
                mask = self.mask.with_base({name: self.base[name] for name in self.mask.names})
                writer = TicketWriter(path, mask, dict(provenance or {}), overwrite=overwrite)
            except (ValueError, OSError) as error:
                outcome[0] = error
        num_changed = 0
        for name in self.mask.names:
            values, base = self._collect(training, name, dtype)
            if is_writer and writer is not None and outcome[0] is None:
                num_changed += _count_changed(values, base)
                try:
                    writer.add(name, values, base)
                except (ValueError, OSError) as error:
                    outcome[0] = error
        if is_writer and writer is not None:
            try:
                if outcome[0] is None:
                    writer.close()
                    size = sum(file.stat().st_size for file in Path(path).iterdir())
                    outcome[0] = {"num_active": self.mask.num_active, "num_changed": num_changed, "bytes": size}
                else:
                    writer.abandon()
            except (ValueError, OSError) as error:
                outcome[0] = error
        outcome = [_broadcast_outcome(outcome[0])]
        return outcome[0]

    def _check_frozen(self, training: SparseTraining) -> None:
        correction: dict[str, int] = {}
        reduction = self.groups.reduction
        for state in training.states:
            for slot in state.slots():
                entries = state.entries(slot)
                start, _ = owned_range(slot.numel, reduction.shard_size, reduction.shard_rank)
                positions = state.local_index.positions(entries.start, entries.stop) - slot.local_origin + start
                values, base = training.current_values(slot.name, None)
                positions = positions.cpu()
                correction[slot.name] = fingerprint_at(positions, base) - fingerprint_at(positions, values)
        now = self._fingerprints(self.engine.module, correction)
        moved = [name for name, tensor in self.base.items() if now[name].fingerprint != tensor.fingerprint]
        if moved:
            raise RuntimeError(
                f"{len(moved)} tensors changed outside the mask, {moved[0]} first: something wrote into frozen "
                "weights during the "
                "run. The ticket was not written."
            )

    def _collect(self, training: SparseTraining, name: str, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """All values and base values of a tensor on rank 0 (empty elsewhere), from the first shard group."""
        reduction = self.groups.reduction
        base_dtype = getattr(torch, self.base[name].dtype)
        empty = torch.empty(0, dtype=dtype or base_dtype), torch.empty(0, dtype=base_dtype)
        if not self.mask.active(name):
            return empty
        _, slot = training.slot(name)
        rank = dist.get_rank()
        if rank >= reduction.shard_size:
            return empty
        values, base = training.current_values(name, dtype)
        if rank > 0:
            for tensor in (values, base):
                if tensor.numel():
                    dist.send(tensor.to(self.device).view(torch.uint8), 0, group=reduction.shard)
            return empty
        all_values, all_base = [values], [base]
        for source in range(1, reduction.shard_size):
            for pieces, like in ((all_values, values), (all_base, base)):
                received = torch.empty(slot.counts[source], dtype=like.dtype, device=self.device)
                if received.numel():
                    dist.recv(received.view(torch.uint8), source, group=reduction.shard)
                pieces.append(received.cpu())
        return torch.cat(all_values), torch.cat(all_base)


def _engine_dtype(config: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype that the engine will give the weights."""
    if config.bfloat16_config.enabled:
        return torch.bfloat16
    return torch.float16 if config.float16_config.enabled else dtype


def _count_changed(values: Tensor, base: Tensor) -> int:
    """Entries whose bits differ in the base's dtype."""
    bits = torch.int32 if base.element_size() == 4 else torch.int16
    return int((values.to(base.dtype).view(bits) != base.view(bits)).sum())


def _check_same_on_all_ranks(digest: str, device: torch.device) -> None:
    value = torch.tensor([int(digest[:15], 16)], dtype=torch.int64, device=device)
    low, high = value.clone(), value.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise ValueError(
            "the mask differs between ranks: load the same ticket on every rank, or broadcast the mask from rank 0"
        )


def _broadcast_outcome(outcome: Any) -> dict[str, Any]:
    """Rank 0's result on every rank; its error is raised on every rank."""
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]

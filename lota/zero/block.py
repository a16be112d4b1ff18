"""What the runs behind both blocks share: one trainable engine, the model's flags, the base's identity."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lota.choices import check_max_skipped_steps
from lota.ticket import BaseTensor
from lota.zero.checkpoint import progress
from lota.zero.compact.groups import BlockGroups
from lota.zero.compact.skipped_steps import SkippedSteps
from lota.zero.deepspeed import engine as engines
from lota.zero.deepspeed import weights
from lota.zero.fingerprints import fingerprints, holding_nan
from lota.zero.freeze import Freeze

BUCKET_NUMEL = 1 << 22
"""Most fp32 entries in a reduction bucket: 16 MiB, packed, sent and received."""


class BlockRun:
    """Common to both: one trainable engine per block, the model's flags, the base's identity."""

    is_sparse: bool
    optimizer_class: type[Any] | None

    def __init__(self, max_skipped_steps: int) -> None:
        self.skipped = SkippedSteps(check_max_skipped_steps(max_skipped_steps))
        self.engine: Any = None
        self.start: dict[str, BaseTensor] = {}  # all parameters, whole, as the run began
        self.base_identity: dict[str, BaseTensor] = {}  # the same, of the rows that the base has
        self._freeze: Freeze | None = None
        self._groups: BlockGroups | None = None
        self._is_claimed = self._was_built = False
        self.is_closed = False
        self.core: Any = None
        self._last_saved: tuple[Path, int] | None = None

    def claim(self) -> None:
        """An engine is about to be built; ValueError where it is the block's second."""
        if self._is_claimed:
            raise ValueError(
                "a second trainable engine was built in one lota block; give every engine a block of its own"
            )
        self._is_claimed = True

    def check_step(self, *_: Any) -> None:
        """Before any step of a torch optimizer in the block: ValueError where no engine of the block was built yet.

        Training would run to its end outside of DeepSpeed, densely, and only the end of the block would notice.
        """
        if not self._is_claimed:
            raise ValueError(
                "an optimizer steps inside a lota block before a DeepSpeed engine was built in it, so it trains "
                "densely. Give the trainer a ZeRO-3 configuration (deepspeed=... of TrainingArguments), or call "
                "deepspeed.initialize(...); steps of other models belong outside the block"
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

    def before_step(self) -> None:
        """Gradients are complete, and there until the step."""
        self.skipped.before_step(self._not_finite)

    def after_step(self, was_skipped: bool, scale_may_fall: bool) -> None:
        self.skipped.after_step(was_skipped, self.engine.global_steps, counts=not scale_may_fall)

    def _not_finite(self) -> dict[str, Tensor]:
        """For each tensor that takes part whether this rank's part of its gradient is not finite, as bool scalars on
        the device."""
        return self.core.not_finite()

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be resumed from: JSON, the same on every rank."""
        return {
            "base": {name: f"{tensor.dtype} {tensor.fingerprint}" for name, tensor in self.base_identity.items()},
            "global_batch": self.engine.train_batch_size(),
            "parameter_groups": len(self.engine.optimizer.param_groups),
        }

    def save_checkpoint(self, save_dir: Path, tag: Any, client_state: Mapping[str, Any], save_latest: bool) -> None:
        """What `engine.save_checkpoint` does inside a block; a second save of the same step does nothing."""
        engine = self._need_engine("save_checkpoint")
        name = f"global_step{engine.global_steps}" if tag is None else str(tag)
        folder = save_dir / name
        size, rank = self.groups.reduction.shard_size, dist.get_rank()
        is_there = [self._last_saved == (folder.absolute(), engine.global_steps) and folder.is_dir()]
        dist.broadcast_object_list(is_there, src=0)
        if is_there[0]:
            return
        progress.save(
            engine,
            self.core,
            self._identity(),
            folder,
            file_number=rank if rank < size else None,
            num_files=size,
            client_state=client_state,
        )
        self._last_saved = folder.absolute(), engine.global_steps
        if save_latest and rank == 0:
            progress.mark_latest(save_dir, name)
        dist.barrier()

    def load_checkpoint(self, load_dir: Path, tag: Any, load_lr_scheduler_states: bool) -> tuple[str, dict[str, Any]]:
        """What `engine.load_checkpoint` does inside a block: the folder and its client state."""
        engine = self._need_engine("load_checkpoint")
        folder = load_dir / (progress.latest_tag(load_dir) if tag is None else str(tag))
        client_state = progress.load(
            engine, self.core, self._identity(), folder, load_lr_scheduler_states=load_lr_scheduler_states
        )
        # The weights were written on the default stream; DeepSpeed gathers them on streams of its own.
        get_accelerator().synchronize()
        self._last_saved = None
        return str(folder), client_state

    def close(self, has_failed: bool) -> None:
        """End of the block."""
        self.is_closed = True
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
            reason = (
                "its state was released"
                if self._was_built
                else "none was built yet: train first, with a ZeRO-3 configuration (deepspeed=... of TrainingArguments)"
            )
            raise ValueError(f"{what} needs the engine of the block, and {reason}")
        return self.engine

    def _fingerprints(
        self,
        model: torch.nn.Module,
        correction: Mapping[str, int] | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> dict[str, BaseTensor]:
        """Of every parameter; with `rows` of the leading rows of those that it names, and of nothing else."""
        reduction = self.groups.reduction
        return fingerprints(
            (part for part in weights.partitions(model) if rows is None or part.name in rows),
            size=reduction.shard_size,
            rank=reduction.shard_rank,
            group=reduction.shard,
            device=self.device,
            correction=correction,
            rows=rows,
        )

    def _identify(self, model: torch.nn.Module, new: Mapping[str, int]) -> None:
        """Take the fingerprints of the model as it is now, the base. new: how many rows the base has of tensors of
        which it does not have all."""
        reduction = self.groups.reduction
        shards = (reduction.shard_size, reduction.shard_rank, reduction.shard)
        not_a_number = holding_nan(weights.partitions(model), *shards, self.device)
        if not_a_number:
            raise ValueError(
                f"{not_a_number[0]} holds NaN (and {len(not_a_number) - 1} more tensors do): every loss would be NaN. "
                "Copy the base again"
            )
        self.start = self._fingerprints(model)
        self.base_identity = self.start | (self._fingerprints(model, rows=new) if new else {})

    def _check_optimizer_holds(self, names: Iterable[str], optimizer: Any, what: str) -> None:
        """ValueError where a tensor that takes part is not one of the optimizer's."""
        held = {name for group in weights.trainable_groups(optimizer) for name in group.names}
        missing = [name for name in names if name not in held]
        if missing:
            more = f" and {len(missing) - 1} more tensors" if missing[1:] else ""
            raise ValueError(
                f"{what} {missing[0]}{more}, but the optimizer was not given them; pass model.parameters()"
            )

    def release(self) -> None:
        """Drop the state of this run: scores or masters and moments, and the process groups that carried gradients.

        The engine cannot train afterwards. Collective.
        """
        if self.engine is not None:
            if hasattr(self.engine.optimizer, "core"):
                self.engine.optimizer.core = None
            engines.drop_engine(self.engine)
        self.core = self.engine = None
        if self._groups is not None:
            self._groups.destroy()
            self._groups = None
        gc.collect()  # model, engine and dense states are one cycle: where nobody uses them any more, they go here

    def _weights_bytes(self) -> int:
        return sum(part.data.nbytes for part in weights.partitions(self._need_engine("report").module))

"""What the runs behind both blocks share: one trainable engine, the model's flags, the base's identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from lota.ticket import BaseTensor
from lota.zero import engine as engines
from lota.zero.base import fingerprints
from lota.zero.frozen import Freeze
from lota.zero.groups import BlockGroups

BUCKET_NUMEL = 1 << 22
"""Most fp32 entries in a reduction bucket: 16 MiB, packed, sent and received."""


class BlockRun:
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

"""What a block reads of the engine's resolved DeepSpeed configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


def communication_dtype(engine: Any) -> torch.dtype:
    """In which dtype compact gradients are sent: DeepSpeed's `communication_data_type`, fp32 where it is not given."""
    return engine._config.communication_data_type or torch.float32


@dataclass(frozen=True)
class GatherLimits:
    """How many gathered parameters ZeRO-3 keeps, in entries."""

    persistence_threshold: int
    live_parameters: int


def gather_limits(engine: Any) -> GatherLimits:
    """As the engine applies them."""
    zero = engine._config.zero_config
    return GatherLimits(
        int(zero.param_persistence_threshold), min(int(zero.max_live_parameters), int(zero.max_reuse_distance))
    )

"""One process as a world of one rank, and DeepSpeed engines in it."""

from __future__ import annotations

import atexit
import logging
import os
import socket
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Device


def join_world_of_one(device: Device) -> None:
    """torch.distributed through DeepSpeed, on the device's own backend, until the process ends."""
    import deepspeed

    from lota.ranks.world import leave_out_shared_memory

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if dist.is_initialized():
        return
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    leave_out_shared_memory()
    deepspeed.init_distributed(device.backend, verbose=False)
    atexit.register(_leave)


def build(model: torch.nn.Module, optimizer: torch.optim.Optimizer, **overrides: Any) -> Any:
    """A ZeRO-3 engine with one sequence a step, in bf16."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        **overrides,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

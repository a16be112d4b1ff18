"""The ranks a block runs on, whoever started them: DeepSpeed's launcher, accelerate, torchrun, or nobody.

One process that no launcher started becomes a world of one rank. On CPUs, transformers starts torch.distributed without
DeepSpeed, and `zero.Init` then takes the world for one rank; DeepSpeed's own start, before any model is loaded, avoids
that.
"""

from __future__ import annotations

import atexit
import os
import socket

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Several processes started by mpirun or srun: DeepSpeed finds out about these itself, or says what it misses.
_SEVERAL = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def join_world() -> None:
    """Make this process ready to be a rank. On CPUs collective; on accelerators the trainer makes the groups."""
    is_launched = any(name in os.environ for name in _LAUNCHED)
    if not (dist.is_initialized() or is_launched or any(int(os.environ.get(name, "1")) > 1 for name in _SEVERAL)):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    if get_accelerator().device_name() == "cpu":
        leave_out_shared_memory()
        if not dist.is_initialized():
            deepspeed.init_distributed(verbose=False)
    atexit.unregister(_leave_world)
    atexit.register(_leave_world)


def leave_out_shared_memory() -> None:
    """Before ranks meet on CPUs: do without DeepSpeed's operation for tensor-parallel inference, of no use here.

    It is compiled at the first start, leaves 67 MB a rank in /dev/shm when the job is over, and waits for ever for a
    rank that dies while it starts.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _leave_world() -> None:
    """End gloo's threads: an interpreter that exits under them aborts now and then, after all work was done."""
    if dist.is_initialized() and dist.get_backend() == dist.Backend.GLOO:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank() -> int:
    """This process's rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def print_once(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(f"[lota] {text}", flush=True)


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))

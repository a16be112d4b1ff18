"""What a stock ZeRO-3 engine holds and sends, for comparisons: counted on its tensors, by DeepSpeed's own names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lota.zero.deepspeed.weights import partitions


def dense_report(engine: Any, num_micro_steps: int) -> dict[str, Any]:
    """Bytes this rank holds by kind, and bytes of gradients it sent in `num_micro_steps` backwards.

    bytes_sent: a stock engine reduces in every micro step, and every reduction hands over each trained tensor's
    gradient once, its equal pieces padded, in the dtype that DeepSpeed communicates in.
    """
    optimizer = engine.optimizer
    trained = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    moments = (value for state in optimizer.optimizer.state.values() for value in state.values())
    pieces = sum(param.partition_numel() for param in trained.values())
    world = dist.get_world_size()
    return {
        "num_trained": sum(param.ds_numel for param in trained.values()),
        "steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "bytes_held": {
            "weights": sum(part.data.nbytes for part in partitions(engine.module)),
            "masters": _nbytes(optimizer.fp32_partitioned_groups_flat),
            "moments": _nbytes(value for value in moments if torch.is_tensor(value)),
            "gradients": _nbytes([optimizer.grad_partitions_flat_buffer]),
            "buffers": _nbytes(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
        },
        "bytes_sent": num_micro_steps * pieces * world * optimizer.communication_data_type.itemsize if world > 1 else 0,
        "reductions": num_micro_steps,
    }


def _nbytes(tensors: Iterable[Tensor | None]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor is not None}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

"""How a model's weights stand under ZeRO-3: names, shapes, this rank's pieces, and whom they are shared with.

With `engine.py`, `optimizer.py` and `dense_state.py` the only file with DeepSpeed's private names.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.comm
import torch

from lota.zero.compact.training import TensorGroup


def trainable_groups(optimizer: Any) -> list[TensorGroup]:
    """The tensors that a ZeRO-3 optimizer under construction trains, as they stand in its flat buffers."""
    return [
        TensorGroup(
            tuple(optimizer.param_names[param] for param in params),
            tuple(param.ds_numel for param in params),
            flat,
            optimizer.sub_group_to_group_id[index],
        )
        for index, (params, flat) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp16_partitioned_groups_flat, strict=True)
        )
    ]


def partitions(model: torch.nn.Module) -> Iterator[SimpleNamespace]:
    """Every parameter under ZeRO-3: name, shape, dtype, numel, this rank's padded piece `data`, and its group."""
    for name, param in _zero_parameters(model):
        yield SimpleNamespace(
            name=name,
            shape=tuple(param.ds_shape),
            dtype=param.dtype,
            numel=param.ds_numel,
            data=param.ds_tensor.data,
            group=param.ds_process_group,
        )


def _zero_parameters(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Named parameters with the attributes that `zero.Init` gives them."""
    yield from model.named_parameters()


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers: what a checkpoint of the model holds beside its parameters. Every rank has them whole."""
    stored = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def engine_dtypes(model: torch.nn.Module, engine_config: Any) -> dict[str, torch.dtype]:
    """The dtype that every parameter will have in the engine: DeepSpeed casts a model that was not made by `zero.Init`,
    and only such."""
    parameters = dict(model.named_parameters())
    dtypes = {name: param.dtype for name, param in parameters.items()}
    if any(hasattr(param, "ds_id") for param in parameters.values()):
        return dtypes
    if engine_config.bfloat16_config.enabled:
        return dict.fromkeys(dtypes, torch.bfloat16)
    return dict.fromkeys(dtypes, torch.float16) if engine_config.float16_config.enabled else dtypes


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Full shape of every parameter, sharded or not."""
    return {name: tuple(getattr(param, "ds_shape", param.shape)) for name, param in model.named_parameters()}


def has_mixed_dtypes(model: torch.nn.Module) -> bool:
    """Whether the tensors to be trained have more than one dtype."""
    return len({param.dtype for param in model.parameters() if param.requires_grad}) > 1


def regroup(model: torch.nn.Module, group: Any) -> None:
    """Reshard every parameter over the ranks of `group`, one tensor at a time; bits are kept. Collective over the
    world.

    Models that transformers loads are sharded over the world, because `zero.Init` cannot load them into several groups.
    """
    world = deepspeed.comm.get_world_group()
    for _, param in _zero_parameters(model):
        assert param.ds_process_group == world  # see check_world_sharded
        param.all_gather()
        param.ds_process_group = group
        param.ds_zero_partition_rank = deepspeed.comm.get_rank(group=group)
        param.ds_zero_partition_world_size = deepspeed.comm.get_world_size(group=group)
        param.ds_tensor = None
        param.partition()


def check_world_sharded(model: torch.nn.Module, cure: str) -> None:
    """ValueError for a parameter sharded over a smaller group: the block would take its pieces for the world's, and
    DeepSpeed's own reduction would let replicas diverge."""
    world = deepspeed.comm.get_world_group()
    for name, param in model.named_parameters():
        if getattr(param, "ds_process_group", world) != world:
            raise ValueError(
                f"{name} is sharded over a group of its own; a lota block takes weights that are whole or sharded over "
                f"all ranks: load the model without data_parallel_group{cure}"
            )


def shard_over_world(model: torch.nn.Module, engine: Any) -> None:
    """Shard what is not sharded yet over the world, exactly as ZeRO-3 would do a moment later."""
    parameters: list[Any] = list(model.parameters())
    plain = [param for param in parameters if not hasattr(param, "ds_id")]
    if plain and len(plain) == len(parameters):
        offload = engine.zero_offload_param()
        device = None if offload is None else offload.device
        deepspeed.zero.Init(
            module=model,
            config_dict_or_path=engine.config,
            dtype=parameters[0].dtype,
            remote_device=device,
            pin_memory=bool(offload and offload.pin_memory),
        )
    elif plain:
        next(param for param in parameters if hasattr(param, "ds_id")).convert_to_zero_parameters(param_list=plain)


def own_part(param: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter: its partition where it is sharded, else all of it. No copy."""
    return param.ds_tensor if hasattr(param, "ds_tensor") else param.detach()


def whole_numel(param: torch.nn.Parameter) -> int:
    """Entries of the whole parameter, sharded or not."""
    return int(getattr(param, "ds_numel", param.numel()))

"""Which DeepSpeed configurations compact state can run under; every other one is refused by name, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def check_config(config: Any, *, is_sparse: bool, is_compact: bool, mpu: Any = None) -> None:
    """Raise ValueError for a `DeepSpeedConfig` that names something unsupported.

    is_sparse: for sparse training. is_compact: the gradients are ours, in sparse training and in calibration by
    gradients; calibration by dense training is DeepSpeed's own and may offload its optimizer to the CPU.
    """
    zero = config.zero_config
    if int(zero.stage) != 3:
        raise ValueError(
            f"ZeRO stage 3 is required, got stage {int(zero.stage)}. Set zero_optimization.stage to 3; to keep "
            "whole weights on "
            "every rank as the lower stages do, also pass shard_group_size=1."
        )
    for setting, reason in _refusals(config, mpu, is_sparse, is_compact):
        raise ValueError(f"{setting} is not supported: {reason}. Delete it from the DeepSpeed configuration.")


def _refusals(config: Any, mpu: Any, is_sparse: bool, is_compact: bool) -> Iterator[tuple[str, str]]:
    zero, raw = config.zero_config, config._param_dict
    dense = "it works on dense gradients or optimizer states, which do not exist here"
    wire = "gradients are compacted before they are sent"
    split = "it cuts weights in other ways than ZeRO-3 does"
    if zero.zenflow is not None:
        yield "zero_optimization.zenflow", dense
    for key in ("offload_optimizer", "offload_param"):
        offload = getattr(zero, key)
        if offload is None or str(getattr(offload.device, "value", offload.device)) == "none":
            continue
        if str(getattr(offload.device, "value", offload.device)) == "nvme":
            yield f"zero_optimization.{key} to nvme", "weights and states must be addressable memory"
        if getattr(offload, "super_offload", False):
            yield "zero_optimization.offload_optimizer.super_offload (SuperOffload)", dense
        if key == "offload_optimizer" and is_sparse:
            yield (
                "zero_optimization.offload_optimizer",
                "optimizer state has the size of the mask and stays with the weights",
            )
    if (config.optimizer_name or "").startswith("muon"):
        yield "the Muon optimizer", "its update of a weight depends on the whole matrix"
    if zero.zero_hpz_partition_size > 1:
        yield "zero_optimization.zero_hpz_partition_size (hpZ)", "shard_group_size does the same without a second copy"
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if getattr(zero, key):
            yield f"zero_optimization.{key}", "frozen weights must keep their bits and gradients are sent exactly"
    if config.tensor_parallel_config.autotp_size > 1:
        yield "tensor_parallel (AutoTP)", split
    if getattr(config.expert_parallel_config, "enabled", False):
        yield "expert_parallel (AutoEP)", split
    if raw.get("sequence_parallel_size", 1) > 1:
        yield "sequence_parallel_size (sequence parallelism)", "gradients would have to be averaged over other groups"
    if mpu is not None:
        yield "a model parallel unit (mpu)", split
    if config.torch_autocast_enabled:
        yield "torch_autocast", "gradients would come in several dtypes; load the model in bf16 or fp16 and enable that"
    if config.float16_config.fp16_master_weights_and_grads or config.bfloat16_config.bf16_master_weights_and_grads:
        yield "16-bit master weights or optimizer states", "they are fp32 and already as small as the mask"
    if config.prescale_gradients or config.gradient_predivide_factor != 1.0:
        yield "prescale_gradients / gradient_predivide_factor", wire
    if config.compile_config.deepcompile:
        yield "compile.deepcompile (DeepCompile)", "its graphs bypass the gradient hooks"
    if config.load_universal_checkpoint:
        yield "checkpoint.load_universal (universal checkpoints)", "they hold dense states"
    if is_compact and raw.get("communication_data_type") not in (None, "fp32", "bf16"):
        yield "communication_data_type: fp16", "gradients overflow in it; fp32, the default here, and bf16 work"
    if is_compact and config.grad_accum_dtype not in (None, "fp32"):
        yield "data_types.grad_accum_dtype", "compact gradients are accumulated in fp32"
    if is_compact and not zero.reduce_scatter:
        yield "zero_optimization.reduce_scatter: false", "gradients go to their owners only"
    if is_compact and not config.managed_gradient_accumulation:
        yield "managed_gradient_accumulation: false", "the end of a step must be known during backward"


def check_optimizer_class(optimizer: Any) -> None:
    """Raise ValueError for optimizers that are known to look at whole matrices."""
    if "Muon" in type(optimizer).__name__:
        raise ValueError(
            "the Muon optimizer is not supported: its update of a weight depends on the whole matrix. Use AdamW "
            "or RMSprop."
        )


def check_no_adapters(model: torch.nn.Module) -> None:
    """Raise ValueError for a model that PEFT wrapped or put adapters into: they alone are trainable, and a mask of
    adapters is seldom what was meant."""
    for name, module in model.named_modules():
        if any(kind.__module__.split(".")[0] == "peft" for kind in type(module).__mro__):
            where = f" ({type(module).__name__} at {name})" if name else f" ({type(module).__name__})"
            raise ValueError(
                f"the model holds adapters of PEFT{where}, so calibration would choose among their weights and not "
                "among the model's. Pass the model without adapters, or merge them: model = model.merge_and_unload(); "
                "model.requires_grad_(True). To train entries of the adapters, name them: "
                'include=["*.lora_A.*", "*.lora_B.*"]'
            )

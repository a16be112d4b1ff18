"""The LoRA baseline: PEFT's adapter, trained by TRL, saved as PEFT reads it and merged with one rounding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
from torch import Tensor

from lota.files import make_readable
from lota.ranks.world import barrier, print_once, rank
from lota.run.resolve import Adapter, RunOptions
from lota.zero.deepspeed.weights import whole_numel


def peft_config(adapter: Adapter) -> Any:
    """PEFT's configuration of the adapter, made as TRL's `get_peft_config` makes it."""
    from peft import LoraConfig

    targets = list(adapter.target_modules)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        # One word stands for itself, as in TRL: "all-linear", or a regular expression.
        target_modules=targets[0] if len(targets) == 1 else targets,
        use_rslora=adapter.use_rslora,
        bias="none",
    )


def save_adapter(engine: Any, path: Path, options: RunOptions) -> dict[str, Any]:
    """Write the adapter of a ZeRO-3 engine, in the weights' dtype, and say how large it is. Collective."""
    engine.empty_partition_cache()
    model = engine.module
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    tensors: dict[str, Tensor] = {}
    for name, param in trained.items():
        with deepspeed.zero.GatheredParameters([param]):
            if rank() == 0:
                tensors[name] = param.detach().cpu().clone()
    numel = sum(map(whole_numel, trained.values()))
    nbytes = sum(whole_numel(param) * param.element_size() for param in trained.values())
    if rank() == 0:
        temporary = path.with_name(f".{path.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        model.peft_config["default"].base_model_name_or_path = options.model
        model.peft_config["default"].revision = options.revision
        # Embeddings are not trained; left on "auto", PEFT asks the hub whether they were resized.
        model.save_pretrained(temporary, state_dict=tensors, save_embedding_layers=False)
        make_readable(temporary)
        shutil.rmtree(path, ignore_errors=True)  # of a run that was stopped between its adapter and its summary
        os.replace(temporary, path)
        print_once(f"adapter: {numel} entries, {nbytes / 2**20:.2f} MiB, in {path}")
    barrier()
    return {"num_trained": numel, "bytes": nbytes}


def merged_tensors(model: Any) -> Iterator[tuple[str, Tensor | None]]:
    """Names of the base's tensors and, on rank 0, the tensors with the adapter added. Collective, one at a time.

    W + scaling B A in fp32, where scaling is alpha / r, or alpha / sqrt(r) with use_rslora; rounded once.
    """
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if hasattr(module, "lora_A")}
    for name, param in base.named_parameters():
        if ".lora_" in name:
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        factors = [] if layer is None else [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        with deepspeed.zero.GatheredParameters([param, *factors]):
            tensor = None
            if rank() == 0:
                tensor = param.detach() if layer is None else _merge(layer, param)
                tensor = tensor.cpu().clone()
            yield name.replace(".base_layer.", "."), tensor


def _merge(layer: Any, weight: Tensor) -> Tensor:
    down, up = (factor["default"].weight.detach().float() for factor in (layer.lora_A, layer.lora_B))
    delta = up @ down
    if layer.fan_in_fan_out:
        delta = delta.T
    return (weight.detach().float() + delta * layer.scaling["default"]).to(weight.dtype)

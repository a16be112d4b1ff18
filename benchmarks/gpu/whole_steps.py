"""Stages `1b-*`: whole steps of a 1B Llama under one method, each in a process of its own.

Trained are the eligible tensors only, under every method alike (LoRA: rank 16 on the same tensors). The first of these
stages is dense ZeRO-3's; the sparse ones have its tokens a second as their aim.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

import lota
from benchmarks.gpu import engines, models
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.training import measure_shares, measure_steps

LORA_RANK = 16
NAME = "1B"


def run(bench: Bench) -> None:
    method, density = bench.options["method"], bench.options.get("density")
    device = bench.device
    engines.join_world_of_one(device)
    model = models.make_llama(bench.sizes.model_1b, device.torch)
    shapes = models.eligible_shapes(model)
    block: Any = nullcontext()
    if method == "sparse":
        mask = models.random_mask(shapes, density, device.torch)
        block = lota.sparse_zero3(mask)
        bench.note(f"{mask.num_active:,} of {mask.eligible:,} eligible weights train")
    elif method == "lora":
        model = _with_adapters(model, shapes)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in shapes)
    model.enable_input_require_grads()
    device.collect()
    with block:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine = engines.build(model, torch.optim.AdamW(trained, lr=1e-4, fused=True))
        dense = bench.earlier("1b-dense", f"{NAME}: tokens/s") if method == "sparse" else None
        measure_steps(bench, engine, NAME, at_least=dense)
        if method == "sparse":
            bench.attempt("shares", lambda: measure_shares(bench, engine, NAME), seconds=2)


def _with_adapters(model: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = sorted({name.split(".")[-2] for name in shapes})
    config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)
    return get_peft_model(model, config, autocast_adapter_dtype=False)

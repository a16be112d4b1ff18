"""A plugin for vLLM on CPUs: linear layers compute with their weights as they are, as on GPUs, and pack no copy."""

from __future__ import annotations

from typing import Any


def register() -> None:
    import torch
    from vllm.model_executor.layers import utils

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = plain

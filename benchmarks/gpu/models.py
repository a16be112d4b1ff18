"""Llamas with random weights, made where they stay, and random masks on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lota import Mask
from lota.selection import eligible

SEED = 11


def llama_config(values: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**values, max_position_embeddings=8192, use_cache=False, dtype="bfloat16")


def make_llama(values: dict[str, Any], device: torch.device) -> Any:
    """bf16, in training mode; the same bits at every call. No weight passes through host memory."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with device:
        model = AutoModelForCausalLM.from_config(llama_config(values), dtype=torch.bfloat16)
    return model.train()


def make_bare(shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> nn.Module:
    """Nothing but the named bf16 parameters, with random values."""
    root = nn.Module()
    generator = torch.Generator(device).manual_seed(SEED)
    for name, shape in shapes.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
        module.register_parameter(last, nn.Parameter(values, requires_grad=False))
    return root


def eligible_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """What trains, under every method alike: lota's own choice."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: shapes[name] for name in eligible(shapes)}


def random_positions(numel: int, density: float, generator: torch.Generator) -> Tensor:
    """Ascending int64 positions on the generator's device; every entry is drawn by itself."""
    return torch.rand(numel, generator=generator, device=generator.device).lt(density).nonzero().flatten()


def random_mask(shapes: Mapping[str, tuple[int, ...]], density: float, device: torch.device, seed: int = 1) -> Mask:
    generator = torch.Generator(device).manual_seed(seed)

    def rows() -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        for name, shape in shapes.items():
            yield name, shape, random_positions(math.prod(shape), density, generator).cpu()

    return Mask.from_indices(rows())

"""How large everything is: on a GPU what the questions need, in CI as little as runs the same code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_HEADS |= {"rms_norm_eps": 1e-5}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, **_HEADS}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, **_HEADS}
LLAMA_1B |= {"tie_word_embeddings": True}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}


@dataclass(frozen=True)
class Sizes:
    """weights: of the step's cases by name. rounds: turns of every timed call. tests: files and options of pytest, the
    most telling first. index_entries: of the index whose building is measured. slots: of the reducer, entries each."""

    name: str
    weights: dict[str, int]
    rounds: int
    copied_bytes: int
    tests: tuple[tuple[str, ...], ...]
    index_entries: int
    slots: tuple[int, ...]
    bucket: int
    whole_gradient: int
    turns: int
    busy_width: int
    model_1b: dict[str, Any]
    model_8b: dict[str, Any]
    tokens: int
    steps: int
    calibration_steps: int
    swaps: int


# Weights of one layer of Llama 3.1 8B (attention and MLP), and an eighth of all 32 of them: one partition of 8.
FULL = Sizes(
    name="full",
    weights={"a layer of 8B": 218_103_808, "an eighth of 8B": 872_415_232},
    rounds=20,
    copied_bytes=1 << 28,
    tests=(
        ("-m", "gpu", "tests/kernels/test_step_is_exact.py", "tests/kernels/test_launch_shapes.py"),
        ("-m", "gpu", "tests/kernels/test_rounding.py", "tests/kernels/test_ops.py"),
        ("-m", "gpu", "tests/kernels/test_gpu.py", "-k", "not memory_checker"),
        ("-m", "gpu", "tests/kernels", "tests/selection", "tests/ticket", "tests/zero", "-k", "not memory_checker"),
    ),
    index_entries=200_000_000,
    slots=(3_000_000, 2_000_000, 4_500_000, 7, 1_000_000),
    bucket=1 << 22,
    whole_gradient=14336 * 4096,
    turns=20,
    busy_width=4096,
    model_1b=LLAMA_1B,
    model_8b=LLAMA_8B,
    tokens=2048,
    steps=8,
    calibration_steps=4,
    swaps=10,
)

TINY = Sizes(
    name="tiny",
    weights={"a tiny layer": 200_000},
    rounds=3,
    copied_bytes=1 << 20,
    tests=(("-m", "not gpu", "tests/kernels/test_step_is_exact.py", "-k", "rmsprop and 1025 and dtype0"),),
    index_entries=200_000,
    slots=(3000, 2000, 4500, 7, 1000),
    bucket=1 << 12,
    whole_gradient=1 << 16,
    turns=3,
    busy_width=64,
    model_1b={**_TINY, "tie_word_embeddings": True},
    model_8b=_TINY,
    tokens=32,
    steps=3,
    calibration_steps=2,
    swaps=2,
)

SIZES = {"full": FULL, "tiny": TINY}


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The matrices of every layer's attention and MLP, under transformers' names."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{number}.{name}.weight": shape
        for number in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }


def numel(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())

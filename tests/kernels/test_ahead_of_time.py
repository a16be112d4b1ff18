"""Every kernel compiles for GPUs that are not here: no spills, registers within a recorded budget, and 16-byte accesses
on every compact buffer.

All variants are compiled for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs a process without the interpreter", allow_module_level=True)

from lota.kernels import triton_ops
from tests.kernels.ahead_of_time import TARGETS, Machine, compile_for

DTYPES = ("*i16", "*fp16", "*fp32")  # bf16 travels as its bits
OFFSETS = ("*i16", "*i32")
INDEX = {"base_ptr": "*i64", "num_active": "i64", "start": "i64", "stop": "i64", "origin": "i64", "numel": "i64"}
PULL = {"importance_ptr": "*i16", "rate_ptr": "*fp32"}
FLOATS = dict.fromkeys(("one_minus_beta1", "beta2", "one_minus_beta2", "alpha", "one_minus_alpha", "eps"), "fp32")
STATE = dict.fromkeys(("master_ptr", "exp_avg_ptr", "exp_avg_sq_ptr", "square_avg_ptr", "scalars_ptr"), "*fp32")

# Most registers a thread that any variant needed when this was recorded (triton 3.9.0), and a tenth more.
BUDGET = {
    "adamw_kernel": {"sm_80": 119, "sm_90": 124, "sm_100": 123, "gfx942": 55},
    "adamw_kernel IS_STOCHASTIC": {"sm_80": 134, "sm_90": 137, "sm_100": 138, "gfx942": 53},
    "rmsprop_kernel": {"sm_80": 101, "sm_90": 103, "sm_100": 102, "gfx942": 56},
    "rmsprop_kernel IS_STOCHASTIC": {"sm_80": 118, "sm_90": 118, "sm_100": 119, "gfx942": 44},
    "adamw_kernel IS_PULLED": {"sm_80": 140, "sm_90": 132, "sm_100": 130, "gfx942": 64},
    "adamw_kernel IS_STOCHASTIC IS_PULLED": {"sm_80": 161, "sm_90": 138, "sm_100": 139, "gfx942": 64},
    "rmsprop_kernel IS_PULLED": {"sm_80": 124, "sm_90": 121, "sm_100": 118, "gfx942": 59},
    "rmsprop_kernel IS_STOCHASTIC IS_PULLED": {"sm_80": 134, "sm_90": 136, "sm_100": 132, "gfx942": 53},
    "pull_kernel": {"sm_80": 62, "sm_90": 62, "sm_100": 62, "gfx942": 45},
    "gather_kernel": {"sm_80": 44, "sm_90": 60, "sm_100": 61, "gfx942": 27},
    "gather_kernel IS_SQUARED": {"sm_80": 46, "sm_90": 53, "sm_100": 53, "gfx942": 37},
    "scatter_kernel": {"sm_80": 44, "sm_90": 53, "sm_100": 44, "gfx942": 49},
    "scatter_add_kernel": {"sm_80": 61, "sm_90": 53, "sm_100": 53, "gfx942": 49},
    "exchange_kernel": {"sm_80": 53, "sm_90": 61, "sm_100": 61, "gfx942": 44},
    "squared_norm_kernel": {"sm_80": 53, "sm_90": 53, "sm_100": 53, "gfx942": 40},
    "mask_op_kernel": {"sm_80": 99, "sm_90": 113, "sm_100": 113, "gfx942": 68},
    "popcount_kernel": {"sm_80": 47, "sm_90": 44, "sm_100": 44, "gfx942": 24},
}


def _num_bytes(dtype: str) -> int:
    return 4 if dtype.endswith("32") else 2


def _step_variants(name: str, moments: int):
    for weights in DTYPES:
        for offset in OFFSETS:
            for gradient, is_compact in (("*fp32", True), (weights, False)):
                types = {"weights_ptr": weights, "gradient_ptr": gradient, "offset_ptr": offset, **STATE}
                types["rounding_ptr"] = "*i64"
                state = [4] * (1 + moments)
                loaded = [*state, _num_bytes(offset), *([4] if is_compact else [])]
                for is_stochastic in (False, True) if weights == "*i16" else (False,):
                    constants = {"IS_COMPACT": is_compact, "IS_STOCHASTIC": is_stochastic}
                    constants |= {"BLOCK": triton_ops.TILE} if name == "adamw_kernel" else {}
                    unused = dict.fromkeys(("old_ptr", "importance_ptr", "rate_ptr"), "*i64")
                    yield name, {**types, **unused}, {**constants, "IS_PULLED": False}, loaded, state
                    if offset == "*i16":  # compiling is slow, and wide offsets change nothing about a pull
                        pulled = {**types, **PULL, "old_ptr": weights}
                        beside = [_num_bytes(weights), 2]
                        yield name, pulled, {**constants, "IS_PULLED": True}, [*loaded, *beside], state


def _variants():
    """(kernel, types, constants, bytes an entry of every compact buffer that is loaded, the same of those stored)."""
    yield from _step_variants("adamw_kernel", 2)
    yield from _step_variants("rmsprop_kernel", 1)
    for old in DTYPES:
        for importance in ("*i16", "*fp32"):
            types = {**STATE, "old_ptr": old, "importance_ptr": importance, "rate_ptr": "*fp32", "skip_ptr": "*fp32"}
            yield "pull_kernel", types, {"IS_SKIPPABLE": True}, [4, _num_bytes(old), _num_bytes(importance)], [4]
    for offset in OFFSETS:
        index = _num_bytes(offset)
        for dtype in DTYPES:
            for is_sum, is_aligned in ((True, True), (False, True), (True, False)):
                types = {"out_ptr": "*fp32", "source_ptr": dtype, "offset_ptr": offset, "scale_ptr": "*fp32"}
                types["squares_ptr"] = "*fp32"
                constants = {"IS_ALIGNED": is_aligned, "IS_SCALED": True, "IS_SUM": is_sum, "IS_MOVE": False}
                # A span that begins inside a tile can only be read and written entry by entry.
                compact = [4] if is_aligned else []
                for is_squared in (False, True) if is_sum and dtype == "*i16" else (False,):
                    loaded = [index, *(compact if is_sum else [])]
                    yield "gather_kernel", types, {**constants, "IS_SQUARED": is_squared}, loaded, compact
            types = {"target_ptr": dtype, "values_ptr": "*fp32", "offset_ptr": offset}
            yield "scatter_kernel", types, {"IS_MOVE": False}, [index, 4], []
            types = {"target_ptr": dtype, "delta_ptr": "*fp32", "saved_ptr": dtype, "offset_ptr": offset}
            types["alpha_ptr"] = "*fp32"
            yield "scatter_add_kernel", types, {"IS_SAVED": True}, [index, 4], [_num_bytes(dtype)]
        for bits in ("*i16", "*i32"):
            types = {"out_ptr": bits, "source_ptr": bits, "offset_ptr": offset, "scale_ptr": "*i64"}
            types["squares_ptr"] = "*i64"
            constants = {"IS_ALIGNED": True, "IS_SCALED": False, "IS_SUM": False, "IS_MOVE": True, "IS_SQUARED": False}
            yield "gather_kernel", types, constants, [index], [_num_bytes(bits)]
            types = {"target_ptr": bits, "values_ptr": bits, "offset_ptr": offset}
            yield "scatter_kernel", types, {"IS_MOVE": True}, [index, _num_bytes(bits)], []
            yield "exchange_kernel", types, {}, [index, _num_bytes(bits)], [_num_bytes(bits)]
    block = {"BLOCK": triton_ops.WORDS_BLOCK}
    for dtype in DTYPES:
        yield "squared_norm_kernel", {"values_ptr": dtype, "partial_ptr": "*fp64"}, block, [], []
    for op in ("and", "andnot", "or", "xor"):
        yield "mask_op_kernel", dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*i32"), {"OP": op, **block}, [], []
    yield "popcount_kernel", {"words_ptr": "*i32", "partial_ptr": "*i32"}, block, [], []


def _check(module, variant, target: str) -> Machine:
    """AssertionError where the machine code is not what was recorded."""
    name, types, constants, loaded, stored = variant
    machine = compile_for(getattr(module, name), {**INDEX, **FLOATS, **types}, constants, target)
    entries = triton_ops.TILE // (4 * TARGETS[target].warp_size)  # of a thread
    label = f"{name} {types} {constants} on {target}: {machine}"
    assert machine.spills == 0, label
    option = "".join(f" {key}" for key in ("IS_SQUARED", "IS_STOCHASTIC", "IS_PULLED") if constants.get(key))
    assert machine.registers <= BUDGET[name + option][target], label
    assert machine.wide_loads >= sum(size * entries // 16 for size in loaded), label
    assert machine.wide_stores >= sum(size * entries // 16 for size in stored), label
    return machine


VARIANTS = list(_variants())


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


_SLOW = {"sm_80", "sm_100"}  # a minute each; `make test` has one target of either vendor


@pytest.mark.parametrize(
    "target",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in _SLOW)) for name in ("sm_80", "sm_90", "sm_100", "gfx942")],
)
def test_all_variants_compile(target):
    for variant in VARIANTS:
        _check(triton_ops, variant, target)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_change_that_breaks_wide_accesses_is_found(tmp_path, monkeypatch, target):
    """Masking the compact state by the number of entries, which the compiler does not know, looks harmless."""
    source = Path(triton_ops.__file__).read_text(encoding="utf-8")
    access = "tl.load(master_ptr + first + i)"
    assert source.count(access) == 2
    (tmp_path / "planted_ops.py").write_text(
        source.replace(access, "tl.load(master_ptr + first + i, mask=in_bounds, other=0.0)"), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        planted = importlib.import_module("planted_ops")
        with pytest.raises(AssertionError, match="adamw_kernel"):
            _check(planted, VARIANTS[0], target)
    finally:
        sys.modules.pop("planted_ops", None)

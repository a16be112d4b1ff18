"""Triton versions of the operations, in the order of `reference.py` and with the same arithmetic, bit for bit.

One program works on one tile of the index. Its compact accesses are unmasked, aligned and 16 bytes wide wherever whole
tiles are in bounds; only what goes to dense memory is scattered. The rules that keep the bits equal to the reference on
a GPU and under Triton's interpreter:

bf16 travels as its bits (int16 views) and is converted here, because the interpreter truncates; divisions and square
roots are IEEE (`div_rn`, `sqrt_rn`), and `enable_fp_fusion=False` keeps the compiler from contracting a multiplication
and an addition; there are no atomics. No autotuning: it would run a kernel that works in place many times.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lota.kernels.index import TILE, TileIndex
from lota.kernels.pull import Pull

OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
WORDS_BLOCK = 4096


@triton.jit
def _to_fp32(x):
    """fp32 of bf16 bits (int16), fp16 or fp32."""
    if x.dtype == tl.int16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """fp32 to the bits of bf16 (int16), fp16 or fp32, to nearest even; a NaN stays a quiet NaN."""
    if dtype == tl.int16:
        bits = x.to(tl.uint32, bitcast=True)
        y = _cut_to_bf16(bits, ((bits >> 16) & 1) + 0x7FFF)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def _cut_to_bf16(bits, added):
    """The upper half of fp32 bits after adding to the lower one, as int16; a NaN stays a quiet NaN."""
    rounded = (bits + added) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _fmix64(x):
    x = (x ^ (x >> 33)) * 0xFF51AFD7ED558CCD
    x = (x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53
    return x ^ (x >> 33)


@triton.jit
def _store_weights(weights_ptr, position, w, is_live, rounding_ptr, origin, IS_STOCHASTIC: tl.constexpr):
    """To nearest even, or by random bits (see rounding.py)."""
    if IS_STOCHASTIC:
        key = tl.load(rounding_ptr).to(tl.uint64, bitcast=True)
        place = (position + origin).to(tl.uint64, bitcast=True)
        random = (_fmix64(place * 0x9E3779B97F4A7C15 + key) >> 48).to(tl.uint32)
        y = _cut_to_bf16(w.to(tl.uint32, bitcast=True), random)
    else:
        y = _rounded(w, weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + position, y, mask=is_live)


@triton.jit
def _load_offsets(offset_ptr, first, i):
    """Distances of a tile's entries from its base; whole tiles exist, so nothing is masked."""
    offset = tl.load(offset_ptr + first + i)
    if offset_ptr.dtype.element_ty == tl.int16:
        offset = offset.to(tl.uint16, bitcast=True).to(tl.int32)
    return offset


@triton.jit
def _gather_tile(
    out_ptr,
    source_ptr,
    scale_ptr,
    squares_ptr,
    in_bounds,
    IS_SCALED: tl.constexpr,
    IS_SUM: tl.constexpr,
    IS_MOVE: tl.constexpr,
    IS_SQUARED: tl.constexpr,
):
    x = tl.load(source_ptr, mask=in_bounds)
    if not IS_MOVE:
        x = _to_fp32(x)
        if IS_SCALED:
            x = x * tl.load(scale_ptr)
        if IS_SUM:
            x = _to_fp32(tl.load(out_ptr, mask=in_bounds)) + x
        x = _rounded(x, out_ptr.dtype.element_ty)
    tl.store(out_ptr, x, mask=in_bounds)
    if IS_SQUARED:
        written = _to_fp32(x).to(tl.float64)
        if in_bounds is not None:
            written = tl.where(in_bounds, written, 0.0)
        tl.store(squares_ptr, tl.sum(written * written, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["start", "stop", "origin"])
def gather_kernel(
    out_ptr,
    source_ptr,
    base_ptr,
    offset_ptr,
    scale_ptr,
    squares_ptr,
    start,
    stop,
    origin,
    TILE: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    IS_SCALED: tl.constexpr,
    IS_SUM: tl.constexpr,
    IS_MOVE: tl.constexpr,
    IS_SQUARED: tl.constexpr,
):
    """out: from entry `start` on. IS_ALIGNED: `start` begins a tile. IS_MOVE: bits are copied, dtypes are equal."""
    tile = start // TILE + tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    source_ptr += tl.load(base_ptr + tile) - origin + _load_offsets(offset_ptr, tile * TILE, i)
    if IS_ALIGNED:
        out_ptr += tl.program_id(0).to(tl.int64) * TILE + i
    else:
        out_ptr += tile * TILE - start + i
    squares_ptr += tl.program_id(0)
    if (tile * TILE >= start) & (tile * TILE + TILE <= stop):
        _gather_tile(out_ptr, source_ptr, scale_ptr, squares_ptr, None, IS_SCALED, IS_SUM, IS_MOVE, IS_SQUARED)
    else:
        entry = tile * TILE + i
        in_bounds = (entry >= start) & (entry < stop)
        _gather_tile(out_ptr, source_ptr, scale_ptr, squares_ptr, in_bounds, IS_SCALED, IS_SUM, IS_MOVE, IS_SQUARED)


def gather(
    out: Tensor, source: Tensor, index: TileIndex, scale: Tensor | None, start: int, stop: int, origin: int
) -> None:
    _launch_gather(out, source, index, scale, None, start, stop, origin, is_sum=False)


def gather_add_(
    out: Tensor,
    source: Tensor,
    index: TileIndex,
    scale: Tensor | None,
    squares: Tensor | None,
    start: int,
    stop: int,
    origin: int,
) -> None:
    _launch_gather(out, source, index, scale, squares, start, stop, origin, is_sum=True)


def _launch_gather(
    out: Tensor,
    source: Tensor,
    index: TileIndex,
    scale: Tensor | None,
    squares: Tensor | None,
    start: int,
    stop: int,
    origin: int,
    is_sum: bool,
) -> None:
    is_move = not is_sum and scale is None and out.dtype == source.dtype
    view = _bits if is_move else _values
    with _device_of(source):
        gather_kernel[(-(-stop // TILE) - start // TILE,)](
            view(out),
            view(source),
            index.base,
            index.offset,
            index.base if scale is None else scale,
            index.base if squares is None else squares,
            start,
            stop,
            origin,
            TILE=TILE,
            IS_ALIGNED=start % TILE == 0,
            IS_SCALED=scale is not None,
            IS_SUM=is_sum,
            IS_MOVE=is_move,
            IS_SQUARED=squares is not None,
            **OPTIONS,
        )


@triton.jit
def _scatter_tile(target_ptr, values_ptr, in_bounds, IS_MOVE: tl.constexpr):
    x = tl.load(values_ptr, mask=in_bounds)
    if not IS_MOVE:
        x = _rounded(_to_fp32(x), target_ptr.dtype.element_ty)
    tl.store(target_ptr, x, mask=in_bounds)


@triton.jit(do_not_specialize=["num_active"])
def scatter_kernel(target_ptr, base_ptr, offset_ptr, values_ptr, num_active, TILE: tl.constexpr, IS_MOVE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    target_ptr += tl.load(base_ptr + tl.program_id(0)) + _load_offsets(offset_ptr, first, i)
    if first + TILE <= num_active:
        _scatter_tile(target_ptr, values_ptr + first + i, None, IS_MOVE)
    else:
        _scatter_tile(target_ptr, values_ptr + first + i, i < num_active - first, IS_MOVE)


def scatter_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    is_move = values.dtype == target.dtype
    view = _bits if is_move else _values
    with _device_of(target):
        scatter_kernel[_grid(index)](
            view(target),
            index.base,
            index.offset,
            view(values),
            index.num_active,
            TILE=TILE,
            IS_MOVE=is_move,
            **OPTIONS,
        )


@triton.jit
def _exchange_tile(target_ptr, values_ptr, in_bounds):
    old = tl.load(target_ptr, mask=in_bounds)
    tl.store(target_ptr, tl.load(values_ptr, mask=in_bounds), mask=in_bounds)
    tl.store(values_ptr, old, mask=in_bounds)


@triton.jit(do_not_specialize=["num_active"])
def exchange_kernel(target_ptr, base_ptr, offset_ptr, values_ptr, num_active, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    target_ptr += tl.load(base_ptr + tl.program_id(0)) + _load_offsets(offset_ptr, first, i)
    if first + TILE <= num_active:
        _exchange_tile(target_ptr, values_ptr + first + i, None)
    else:
        _exchange_tile(target_ptr, values_ptr + first + i, i < num_active - first)


def exchange_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    with _device_of(target):
        exchange_kernel[_grid(index)](
            _bits(target), index.base, index.offset, _bits(values), index.num_active, TILE=TILE, **OPTIONS
        )


@triton.jit
def _scatter_add_tile(target_ptr, delta_ptr, alpha_ptr, saved_ptr, in_bounds, IS_SAVED: tl.constexpr):
    old = tl.load(target_ptr, mask=in_bounds)
    if IS_SAVED:
        tl.store(saved_ptr, old, mask=in_bounds)
    delta = _to_fp32(tl.load(delta_ptr, mask=in_bounds)) * tl.load(alpha_ptr)
    tl.store(target_ptr, _rounded(_to_fp32(old) + delta, target_ptr.dtype.element_ty), mask=in_bounds)


@triton.jit(do_not_specialize=["num_active"])
def scatter_add_kernel(
    target_ptr,
    base_ptr,
    offset_ptr,
    delta_ptr,
    alpha_ptr,
    saved_ptr,
    num_active,
    TILE: tl.constexpr,
    IS_SAVED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    target_ptr += tl.load(base_ptr + tl.program_id(0)) + _load_offsets(offset_ptr, first, i)
    if first + TILE <= num_active:
        _scatter_add_tile(target_ptr, delta_ptr + first + i, alpha_ptr, saved_ptr + first + i, None, IS_SAVED)
    else:
        in_bounds = i < num_active - first
        _scatter_add_tile(target_ptr, delta_ptr + first + i, alpha_ptr, saved_ptr + first + i, in_bounds, IS_SAVED)


def scatter_add_(target: Tensor, index: TileIndex, delta: Tensor, alpha: Tensor, saved: Tensor | None) -> None:
    with _device_of(target):
        scatter_add_kernel[_grid(index)](
            _values(target),
            index.base,
            index.offset,
            _values(delta),
            alpha,
            _values(target if saved is None else saved),
            index.num_active,
            TILE=TILE,
            IS_SAVED=saved is not None,
            **OPTIONS,
        )


@triton.jit
def _load_gradient(gradient_ptr, first, position, in_bounds, i, IS_COMPACT: tl.constexpr):
    """fp32 gradients of a tile: compact ones stand there in whole tiles, dense ones are read at active entries only."""
    if IS_COMPACT:
        gradient = tl.load(gradient_ptr + first + i)
    else:
        gradient = tl.load(gradient_ptr + position, mask=in_bounds, other=0)
    return _to_fp32(gradient)


@triton.jit
def _load_pull(old_ptr, importance_ptr, rate_ptr, entry, in_bounds):
    """fp32 old values of a tile, and the rate of the step times its importance."""
    old = _to_fp32(tl.load(old_ptr + entry, mask=in_bounds))
    return old, _to_fp32(tl.load(importance_ptr + entry, mask=in_bounds)) * tl.load(rate_ptr)


@triton.jit
def _pulled(w, old, c):
    return w - (w - old) * tl.div_rn(c, 1 + c)


@triton.jit
def _is_zero(x, i):
    """Whether a scalar is 0, as a block like `i`: the interpreter cannot combine a scalar's truth with a block's."""
    return ((x.to(tl.int32, bitcast=True) << 1) + i * 0) == 0


@triton.jit(do_not_specialize=["num_active", "origin"])
def adamw_kernel(
    weights_ptr,
    gradient_ptr,
    base_ptr,
    offset_ptr,
    master_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    scalars_ptr,
    num_active,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    rounding_ptr,
    origin,
    old_ptr,
    importance_ptr,
    rate_ptr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_COMPACT: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    IS_PULLED: tl.constexpr,
):
    """The skip flag selects old bits instead of branching, so that all loads can start at once.

    BLOCK: entries of a program, a tile or an even part of one.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    in_bounds = i < num_active - first
    position = tl.load(base_ptr + tl.program_id(0) // (TILE // BLOCK)) + _load_offsets(offset_ptr, first, i)
    scale, decay, step_size = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    sqrt_bias_correction2 = tl.load(scalars_ptr + 3)
    is_live = in_bounds & _is_zero(tl.load(scalars_ptr + 4), i)
    w, m, v = tl.load(master_ptr + first + i), tl.load(exp_avg_ptr + first + i), tl.load(exp_avg_sq_ptr + first + i)
    if IS_PULLED:
        old, c = _load_pull(old_ptr, importance_ptr, rate_ptr, first + i, None)
    g = _load_gradient(gradient_ptr, first, position, in_bounds, i, IS_COMPACT) * scale
    new_m = m + (g - m) * one_minus_beta1
    new_v = v * beta2 + g * g * one_minus_beta2
    denominator = tl.div_rn(tl.sqrt_rn(new_v), sqrt_bias_correction2) + eps
    new_w = w * decay - tl.div_rn(new_m, denominator) * step_size
    if IS_PULLED:
        new_w = _pulled(new_w, old, c)
    tl.store(exp_avg_ptr + first + i, tl.where(is_live, new_m, m))
    tl.store(exp_avg_sq_ptr + first + i, tl.where(is_live, new_v, v))
    tl.store(master_ptr + first + i, tl.where(is_live, new_w, w))
    _store_weights(weights_ptr, position, new_w, is_live, rounding_ptr, origin, IS_STOCHASTIC)


def adamw_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    compact: bool,
    rounding: Tensor | None,
    origin: int,
    pull: Pull | None,
    *,
    block: int = TILE,
    num_warps: int = OPTIONS["num_warps"],
) -> None:
    """block: entries of a program, a tile or an even part of one; with num_warps, for benchmarks to vary: the bits are
    the same."""
    with _device_of(weights):
        adamw_kernel[(index.base.numel() * (TILE // block),)](
            _values(weights),
            _values(gradient),
            index.base,
            index.offset,
            master,
            exp_avg,
            exp_avg_sq,
            scalars,
            index.num_active,
            1 - beta1,
            beta2,
            1 - beta2,
            eps,
            index.base if rounding is None else rounding,
            origin,
            *_pull_pointers(pull, index.base),
            TILE=TILE,
            BLOCK=block,
            IS_COMPACT=compact,
            IS_STOCHASTIC=rounding is not None,
            IS_PULLED=pull is not None,
            **(OPTIONS | {"num_warps": num_warps}),
        )


@triton.jit(do_not_specialize=["num_active", "origin"])
def rmsprop_kernel(
    weights_ptr,
    gradient_ptr,
    base_ptr,
    offset_ptr,
    master_ptr,
    square_avg_ptr,
    scalars_ptr,
    num_active,
    alpha,
    one_minus_alpha,
    eps,
    rounding_ptr,
    origin,
    old_ptr,
    importance_ptr,
    rate_ptr,
    TILE: tl.constexpr,
    IS_COMPACT: tl.constexpr,
    IS_STOCHASTIC: tl.constexpr,
    IS_PULLED: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    in_bounds = i < num_active - first
    position = tl.load(base_ptr + tl.program_id(0)) + _load_offsets(offset_ptr, first, i)
    scale, weight_decay, lr = tl.load(scalars_ptr), tl.load(scalars_ptr + 1), tl.load(scalars_ptr + 2)
    is_live = in_bounds & _is_zero(tl.load(scalars_ptr + 3), i)
    w, v = tl.load(master_ptr + first + i), tl.load(square_avg_ptr + first + i)
    if IS_PULLED:
        old, c = _load_pull(old_ptr, importance_ptr, rate_ptr, first + i, None)
    g = _load_gradient(gradient_ptr, first, position, in_bounds, i, IS_COMPACT) * scale + w * weight_decay
    new_v = v * alpha + g * g * one_minus_alpha
    new_w = w - tl.div_rn(g, tl.sqrt_rn(new_v) + eps) * lr
    if IS_PULLED:
        new_w = _pulled(new_w, old, c)
    tl.store(square_avg_ptr + first + i, tl.where(is_live, new_v, v))
    tl.store(master_ptr + first + i, tl.where(is_live, new_w, w))
    _store_weights(weights_ptr, position, new_w, is_live, rounding_ptr, origin, IS_STOCHASTIC)


def rmsprop_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    square_avg: Tensor,
    scalars: Tensor,
    alpha: float,
    eps: float,
    compact: bool,
    rounding: Tensor | None,
    origin: int,
    pull: Pull | None,
) -> None:
    with _device_of(weights):
        rmsprop_kernel[_grid(index)](
            _values(weights),
            _values(gradient),
            index.base,
            index.offset,
            master,
            square_avg,
            scalars,
            index.num_active,
            alpha,
            1 - alpha,
            eps,
            index.base if rounding is None else rounding,
            origin,
            *_pull_pointers(pull, index.base),
            TILE=TILE,
            IS_COMPACT=compact,
            IS_STOCHASTIC=rounding is not None,
            IS_PULLED=pull is not None,
            **OPTIONS,
        )


@triton.jit
def _pull_tile(master_ptr, old_ptr, importance_ptr, rate_ptr, skip_ptr, i, in_bounds, IS_SKIPPABLE: tl.constexpr):
    w = tl.load(master_ptr + i, mask=in_bounds)
    old, c = _load_pull(old_ptr, importance_ptr, rate_ptr, i, in_bounds)
    new_w = _pulled(w, old, c)
    if IS_SKIPPABLE:
        new_w = tl.where(_is_zero(tl.load(skip_ptr), i), new_w, w)
    tl.store(master_ptr + i, new_w, mask=in_bounds)


@triton.jit(do_not_specialize=["numel"])
def pull_kernel(
    master_ptr, old_ptr, importance_ptr, rate_ptr, skip_ptr, numel, TILE: tl.constexpr, IS_SKIPPABLE: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * TILE
    i = first + tl.arange(0, TILE)
    if first + TILE <= numel:
        _pull_tile(master_ptr, old_ptr, importance_ptr, rate_ptr, skip_ptr, i, None, IS_SKIPPABLE)
    else:
        _pull_tile(master_ptr, old_ptr, importance_ptr, rate_ptr, skip_ptr, i, i < numel, IS_SKIPPABLE)


def pull_(master: Tensor, pull: Pull, skip: Tensor | None) -> None:
    with _device_of(master):
        pull_kernel[(-(-master.numel() // TILE),)](
            master,
            *_pull_pointers(pull, master),
            master if skip is None else skip,
            master.numel(),
            TILE=TILE,
            IS_SKIPPABLE=skip is not None,
            **OPTIONS,
        )


def _pull_pointers(pull: Pull | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (unused, unused, unused) if pull is None else (_values(pull.old), _values(pull.importance), pull.rate)


@triton.jit(do_not_specialize=["numel"])
def squared_norm_kernel(values_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """One float64 sum of squares a program; the launcher adds them up."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = _to_fp32(tl.load(values_ptr + i, mask=i < numel, other=0)).to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x * x, axis=0))


def squared_norm(values: Tensor) -> Tensor:
    num_blocks = -(-values.numel() // WORDS_BLOCK)
    partial = torch.empty(num_blocks, dtype=torch.float64, device=values.device)
    with _device_of(values):
        squared_norm_kernel[(num_blocks,)](_values(values), partial, values.numel(), BLOCK=WORDS_BLOCK, **OPTIONS)
    return partial.sum()


@triton.jit
def mask_op_kernel(a_ptr, b_ptr, out_ptr, numel, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + i, mask=i < numel), tl.load(b_ptr + i, mask=i < numel)
    if OP == "and":
        result = a & b
    elif OP == "andnot":
        result = a & ~b
    elif OP == "or":
        result = a | b
    else:
        result = a ^ b
    tl.store(out_ptr + i, result, mask=i < numel)


def mask_op(a: Tensor, b: Tensor, op: str) -> Tensor:
    out = torch.empty_like(a)
    with _device_of(a):
        mask_op_kernel[(-(-a.numel() // WORDS_BLOCK),)](a, b, out, a.numel(), OP=op, BLOCK=WORDS_BLOCK, **OPTIONS)
    return out


@triton.jit
def popcount_kernel(words_ptr, partial_ptr, numel, BLOCK: tl.constexpr):
    """By arithmetic: the interpreter has no instruction that counts bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(words_ptr + i, mask=i < numel, other=0).to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    count = ((x * 0x01010101) >> 24).to(tl.int32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(count, axis=0))


def popcount(words: Tensor) -> Tensor:
    num_blocks = -(-words.numel() // WORDS_BLOCK)
    partial = torch.empty(num_blocks, dtype=torch.int32, device=words.device)
    with _device_of(words):
        popcount_kernel[(num_blocks,)](words, partial, words.numel(), BLOCK=WORDS_BLOCK, **OPTIONS)
    return partial.sum()


def _bits(tensor: Tensor) -> Tensor:
    """As integers of the same size, for kernels that move bits."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def _values(tensor: Tensor) -> Tensor:
    """bf16 as its bits, other floats as they are, for kernels that compute."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _grid(index: TileIndex) -> tuple[int]:
    return (index.base.numel(),)


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; nothing to select under its interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

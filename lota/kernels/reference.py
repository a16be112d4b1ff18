"""Torch versions of the operations between dense and compact space; the oracle for every other backend.

Everything is computed in fp32 with one rounding per operation (no fused multiply-add, IEEE square root), in chunks that
stay in the cache, so that temporaries do not grow with the number of active entries. Nothing here reads a value back to
the host: the skip flag and all step-dependent numbers are device values.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from lota.kernels.index import TILE, TileIndex
from lota.kernels.pull import Pull
from lota.kernels.rounding import random_bits, to_bf16

CPU_CHUNK, DEVICE_CHUNK = 1 << 16, 1 << 22


def _chunks(start: int, stop: int, like: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of whole tiles that stay in a CPU's cache, or that keep an accelerator busy."""
    size = CPU_CHUNK if like.device.type == "cpu" else DEVICE_CHUNK
    for first in range(start, stop, size):
        yield first, min(first + size, stop)


def _sqrt(x: Tensor) -> Tensor:
    """IEEE fp32 square root: the vectorised fp32 one on CPUs is off by one unit in the last place now and then."""
    return x.sqrt() if x.is_cuda else x.double().sqrt_().float()


def gather(
    out: Tensor, source: Tensor, index: TileIndex, scale: Tensor | None, start: int, stop: int, origin: int
) -> None:
    for first, last in _chunks(start, stop, source):
        values = source.index_select(0, index.positions(first, last).sub_(origin))
        out[first - start : last - start] = values if scale is None else values.float() * scale


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
    lead = start % TILE
    for tiles_start, last in _chunks(start - lead, stop, source):
        first = max(tiles_start, start)
        values = source.index_select(0, index.positions(first, last).sub_(origin)).float()
        values = values if scale is None else values * scale
        piece = out[first - start : last - start]
        piece.copy_(piece.float() + values)
        if squares is not None:
            written = pad(piece.double().square_(), (first - tiles_start, -last % TILE)).view(-1, TILE).sum(1)
            first_tile = (tiles_start - start + lead) // TILE
            squares[first_tile : first_tile + written.numel()] = written


def scatter_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    for first, last in _chunks(0, index.num_active, index.base):
        target.index_copy_(0, index.positions(first, last), values[first:last].to(target.dtype))


def scatter_rounded_(target: Tensor, index: TileIndex, values: Tensor, rounding: Tensor, origin: int) -> None:
    for first, last in _chunks(0, index.num_active, index.base):
        positions = index.positions(first, last)
        rounded = to_bf16(values[first:last].float(), random_bits(rounding, positions + origin))
        target.index_copy_(0, positions, rounded)


def exchange_(target: Tensor, index: TileIndex, values: Tensor) -> None:
    for first, last in _chunks(0, index.num_active, index.base):
        positions = index.positions(first, last)
        old = target.index_select(0, positions)
        target.index_copy_(0, positions, values[first:last])
        values[first:last] = old


def scatter_add_(target: Tensor, index: TileIndex, delta: Tensor, alpha: Tensor, saved: Tensor | None) -> None:
    for first, last in _chunks(0, index.num_active, index.base):
        positions = index.positions(first, last)
        old = target.index_select(0, positions)
        target.index_copy_(0, positions, (old.float() + delta[first:last].float() * alpha).to(target.dtype))
        if saved is not None:
            saved[first:last] = old


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
) -> None:
    scale, decay, step_size, sqrt_bias_correction2, skip = scalars.unbind()
    skip = skip != 0
    for first, last in _chunks(0, index.num_active, index.base):
        positions = index.positions(first, last)
        g = _gradient_chunk(gradient, positions, first, last, compact).mul_(scale)
        w, m, v = master[first:last], exp_avg[first:last], exp_avg_sq[first:last]
        new_m = (g - m).mul_(1 - beta1).add_(m)
        new_v = (v * beta2).add_(g.mul_(g).mul_(1 - beta2))
        denominator = _sqrt(new_v).div_(sqrt_bias_correction2).add_(eps)
        new_w = (w * decay).sub_((new_m / denominator).mul_(step_size))
        new_w = new_w if pull is None else _pulled(new_w, pull, first, last)
        _store(weights, positions, skip, rounding, origin, (w, new_w), (m, new_m), (v, new_v))


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
    scale, weight_decay, lr, skip = scalars.unbind()
    skip = skip != 0
    for first, last in _chunks(0, index.num_active, index.base):
        positions = index.positions(first, last)
        w, v = master[first:last], square_avg[first:last]
        g = _gradient_chunk(gradient, positions, first, last, compact).mul_(scale).add_(w * weight_decay)
        new_v = (v * alpha).add_((g * g).mul_(1 - alpha))
        new_w = w - (g / _sqrt(new_v).add_(eps)).mul_(lr)
        new_w = new_w if pull is None else _pulled(new_w, pull, first, last)
        _store(weights, positions, skip, rounding, origin, (w, new_w), (v, new_v))


def pull_(master: Tensor, pull: Pull, skip: Tensor | None) -> None:
    for first, last in _chunks(0, master.numel(), master):
        w = master[first:last]
        new_w = _pulled(w, pull, first, last)
        w.copy_(new_w if skip is None else torch.where(skip != 0, w, new_w))


def _pulled(w: Tensor, pull: Pull, first: int, last: int) -> Tensor:
    """The masters of the entries `first:last` after the pull."""
    c = pull.importance[first:last].float() * pull.rate
    return w - (w - pull.old[first:last].float()).mul_(c / (1 + c))


def _gradient_chunk(gradient: Tensor, positions: Tensor, first: int, last: int, compact: bool) -> Tensor:
    """A fp32 copy of the gradients of the active entries `first:last`."""
    values = gradient[first:last] if compact else gradient.index_select(0, positions)
    return values.to(torch.float32, copy=True)


def _store(
    weights: Tensor,
    positions: Tensor,
    skip: Tensor,
    rounding: Tensor | None,
    origin: int,
    master: tuple[Tensor, Tensor],
    *moments: tuple[Tensor, Tensor],
) -> None:
    for old, new in (master, *moments):
        torch.where(skip, old, new, out=old)
    kept = weights.index_select(0, positions)
    if rounding is None:
        rounded = master[0].to(weights.dtype)
    else:
        rounded = to_bf16(master[0], random_bits(rounding, positions + origin))
    weights.index_copy_(0, positions, torch.where(skip, kept, rounded))


def squared_norm(values: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for first, last in _chunks(0, values.numel(), values):
        total += values[first:last].double().square_().sum()
    return total


def mask_op(a: Tensor, b: Tensor, op: str) -> Tensor:
    return {"and": lambda: a & b, "andnot": lambda: a & ~b, "or": lambda: a | b, "xor": lambda: a ^ b}[op]()


def popcount(words: Tensor) -> Tensor:
    x = words.to(torch.int64) & 0xFFFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101 & 0xFFFFFFFF) >> 24).sum()

"""The operations between dense and compact space: checks, then the backend.

Dense tensors are flat and contiguous (`[index.numel]`); compact ones hold a value per active entry in ascending order,
padded to whole tiles (`[index.offset.numel()]`) where they are state or a step's gradient. Weights may be bf16, fp16 or
fp32; arithmetic is fp32 with one rounding per operation. Names that end in `_` work in place. Nothing is read back to
the host. Wrong dtypes, shapes, strides, devices and numbers raise ValueError; positions were checked when the index was
built.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lota.kernels import reference
from lota.kernels.backend import backend
from lota.kernels.index import TILE, TileIndex
from lota.kernels.pull import Pull

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MASK_OPS = ("and", "andnot", "or", "xor")


def padded_zeros(index: TileIndex, dtype: torch.dtype = torch.float32) -> Tensor:
    """Compact state of zeros for `index`: `[index.offset.numel()]`, whole tiles."""
    return torch.zeros(index.offset.numel(), dtype=dtype, device=index.base.device)


def gather(
    source: Tensor,
    index: TileIndex,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    origin: int = 0,
) -> Tensor:
    """`out[k] = scale * source[position(start + k) - origin]` for the entries `start:stop`; returns `out`.

    source: flat; its first element is position `origin` of the index's space. out: `[stop - start]`, fp32 unless given.
    scale: fp32 device scalar or None.
    """
    stop = index.num_active if stop is None else stop
    _check_span(index, start, stop)
    _check_dense("source", source, index, origin, whole=origin == 0 and start == 0 and stop == index.num_active)
    if out is None:
        out = torch.empty(stop - start, dtype=torch.float32, device=source.device)
    _check_compact("out", out, stop - start, source, exact=True)
    if scale is not None:
        _check_scalar("scale", scale, source)
    if stop > start:
        backend(source.device).gather(out, source, index, scale, start, stop, origin)
    return out


def gather_add_(
    accumulator: Tensor,
    source: Tensor,
    index: TileIndex,
    *,
    scale: Tensor | None = None,
    squares: Tensor | None = None,
    start: int = 0,
    stop: int | None = None,
    origin: int = 0,
) -> Tensor:
    """`accumulator[k] += scale * source[position(start + k) - origin]`, summed in fp32; returns the accumulator.

    squares: None, or fp32 `[ceil(stop / TILE) - start // TILE]`, one value for each tile that the span touches: it
    receives the sum of the squares of what the accumulator holds afterwards (after the rounding to its dtype) at the
    tile's entries inside the span. Summed in float64, rounded once; the same on every call, and but for the last bit in
    every backend.
    """
    stop = index.num_active if stop is None else stop
    _check_span(index, start, stop)
    _check_dense("source", source, index, origin, whole=origin == 0 and start == 0 and stop == index.num_active)
    _check_compact("accumulator", accumulator, stop - start, source, exact=True)
    if scale is not None:
        _check_scalar("scale", scale, source)
    if squares is not None:
        _check_compact("squares", squares, 0, source)
        num_tiles = -(-stop // TILE) - start // TILE if stop > start else 0
        if squares.dtype != torch.float32 or squares.numel() != num_tiles:
            raise ValueError(
                f"squares must be fp32 with one value for each of {num_tiles} tiles, got {squares.dtype} of shape "
                f"{tuple(squares.shape)}"
            )
    if stop > start:
        backend(source.device).gather_add_(accumulator, source, index, scale, squares, start, stop, origin)
    return accumulator


def scatter_(
    target: Tensor, index: TileIndex, values: Tensor, *, rounding: Tensor | None = None, origin: int = 0
) -> Tensor:
    """`target[position(k)] = values[k]`, cast to the target's dtype; all other elements keep their bits.

    rounding, origin: as in `adamw_`; rounded so, fp32 values run on plain torch on every backend, because only a
    resumed run asks for it.
    """
    _check_rounding(rounding, origin, target)
    _check_dense("target", target, index)
    _check_compact("values", values, index.num_active, target)
    if index.num_active and rounding is not None:
        reference.scatter_rounded_(target, index, values, rounding, origin)
    elif index.num_active:
        backend(target.device).scatter_(target, index, values)
    return target


def exchange_(target: Tensor, index: TileIndex, values: Tensor) -> Tensor:
    """Swap `target[position(k)]` and `values[k]` bit for bit; calling it again restores both. Same dtype required."""
    _check_dense("target", target, index)
    _check_compact("values", values, index.num_active, target)
    if values.dtype != target.dtype:
        raise ValueError(
            f"exchange_ moves bits: values must have the target's dtype {target.dtype}, got {values.dtype}"
        )
    if index.num_active:
        backend(target.device).exchange_(target, index, values)
    return target


def scatter_add_(
    target: Tensor, index: TileIndex, delta: Tensor, *, alpha: Tensor, saved: Tensor | None = None
) -> Tensor:
    """`target[position(k)] += alpha * delta[k]`, computed in fp32 and cast; `saved[k]` receives the old bits.

    alpha: fp32 device scalar. Adding and subtracting a delta does not return to the start in bf16; `scatter_` of
    `saved` does.
    """
    _check_dense("target", target, index)
    _check_compact("delta", delta, index.num_active, target)
    if saved is not None:
        _check_compact("saved", saved, index.num_active, target)
        if saved.dtype != target.dtype:
            raise ValueError(f"saved must have the target's dtype {target.dtype}, got {saved.dtype}")
    _check_scalar("alpha", alpha, target)
    if index.num_active:
        backend(target.device).scatter_add_(target, index, delta, alpha, saved)
    return target


def adamw_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    compact: bool = True,
    rounding: Tensor | None = None,
    origin: int = 0,
    pull: Pull | None = None,
) -> None:
    """One AdamW step (Loshchilov and Hutter, arXiv 1711.05101) on compact state, scattered into the weights.

    With g = scale * gradient, in fp32, in this order:
        w = master * decay
        m = m + (g - m) * (1 - beta1);  v = v * beta2 + g * g * (1 - beta2)
        w = w - step_size * (m / (sqrt(v) / sqrt_bias_correction2 + eps))
    `master`, `exp_avg`, `exp_avg_sq` (fp32, compact) are updated in place and w is cast into `weights` (flat, dense) at
    the active positions. scalars: fp32 `[5]` on the device: scale, decay, step_size, sqrt_bias_correction2, skip (see
    `adamw_scalars`); a skip other than 0 leaves everything as it is. gradient: compact, or dense with `compact=False`.

    rounding: None rounds to nearest even; an int64 device scalar (see `rounding_key`) rounds bf16 weights
    stochastically, by bits that hash the key and `origin + position` (see rounding.py). origin: where `weights` begins
    in the space that counts for these bits, so that partitions round as the whole does.

    pull: None, or what w is pulled to before it is stored (the formula stands at `Pull`).
    """
    _check_rounding(rounding, origin, weights)
    _check_step(weights, gradient, index, scalars, 5, compact, master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_pull(pull, index.offset.numel(), weights)
    _check_numbers(beta1=beta1, beta2=beta2, eps=eps)
    if index.num_active:
        backend(weights.device).adamw_(
            weights,
            gradient,
            index,
            master,
            exp_avg,
            exp_avg_sq,
            scalars,
            beta1,
            beta2,
            eps,
            compact,
            rounding,
            origin,
            pull,
        )


def rmsprop_(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    master: Tensor,
    square_avg: Tensor,
    scalars: Tensor,
    *,
    alpha: float,
    eps: float,
    compact: bool = True,
    rounding: Tensor | None = None,
    origin: int = 0,
    pull: Pull | None = None,
) -> None:
    """One RMSprop step (Hinton's lecture 6e; not centered, no momentum) on compact state, scattered into the weights.

    With g = scale * gradient + weight_decay * master, in fp32:
        v = v * alpha + g * g * (1 - alpha);  w = master - (g / (sqrt(v) + eps)) * lr
    scalars: fp32 `[4]` on the device: scale, weight_decay, lr, skip. The rest as in `adamw_`.
    """
    _check_rounding(rounding, origin, weights)
    _check_step(weights, gradient, index, scalars, 4, compact, master=master, square_avg=square_avg)
    _check_pull(pull, index.offset.numel(), weights)
    _check_numbers(alpha=alpha, eps=eps)
    if index.num_active:
        backend(weights.device).rmsprop_(
            weights, gradient, index, master, square_avg, scalars, alpha, eps, compact, rounding, origin, pull
        )


def pull_(master: Tensor, pull: Pull, skip: Tensor | None = None) -> None:
    """The pull alone, on the fp32 compact masters of any optimizer, in place; the formula stands at `Pull`.

    master: fp32, as long as `pull.old` and `pull.importance`. Every entry is pulled, the padding too, which stays zero
    where the paddings of all three are zeros, as `padded_zeros` makes them. skip: None, or a device scalar; nonzero
    leaves everything as it is.
    """
    _check_compact("master", master, 0, master)
    if master.dtype != torch.float32:
        raise ValueError(f"master must be fp32, got {master.dtype}")
    _check_pull(pull, master.numel(), master, exact=True)
    if skip is not None:
        if skip.numel() != 1 or skip.device != master.device:
            raise ValueError(
                f"skip must be one value on {master.device}, got shape {tuple(skip.shape)} on {skip.device}"
            )
        skip = (skip != 0).float()
    if master.numel():
        backend(master.device).pull_(master, pull, skip)


def adamw_scalars(
    scale: Tensor, skip: Tensor, step: Tensor, *, lr: float | Tensor, weight_decay: float, beta1: float, beta2: float
) -> Tensor:
    """The fp32 `[5]` scalars of `adamw_`, computed in float64 on the device of `step` without reading anything back.

    scale, skip: device scalars (gradient factor; nonzero = leave everything). step: float64 device scalar, the number
    of this step counted from 1.
    """
    _check_numbers(weight_decay=weight_decay, beta1=beta1, beta2=beta2)
    lr = _checked_lr(lr)
    step_size = lr / (1 - torch.pow(beta1, step))
    decay = torch.ones_like(step) - lr * weight_decay
    values = (scale.double(), decay, step_size, (1 - torch.pow(beta2, step)).sqrt(), skip.double())
    return torch.stack(values).float()


def rmsprop_scalars(scale: Tensor, skip: Tensor, *, lr: float | Tensor, weight_decay: float) -> Tensor:
    """The fp32 `[4]` scalars of `rmsprop_`; see `adamw_scalars`."""
    _check_numbers(weight_decay=weight_decay)
    lr = _checked_lr(lr)
    one = torch.ones_like(scale, dtype=torch.float64)
    return torch.stack((scale.double(), one * weight_decay, one * lr, skip.double())).float()


def pull_rate(device: torch.device, *, lr: float | Tensor, mu: float) -> Tensor:
    """The rate of `Pull`, `lr * mu` computed in float64: an fp32 scalar on `device`; nothing is read back."""
    _check_numbers(mu=mu)
    lr = _checked_lr(lr)
    if isinstance(lr, Tensor):
        return (lr.double() * mu).float().to(device)
    return torch.full((), lr * mu, dtype=torch.float32, device=device)


def squared_norm(values: Tensor) -> Tensor:
    """Sum of the squares of compact values (or any flat tensor), as a float64 device scalar.

    Squares are exact; the order of the sum is the backend's, so the last bits may differ between backends.
    """
    _check_compact("values", values, 0, values)
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.float64, device=values.device)
    return backend(values.device).squared_norm(values)


def mask_op(a: Tensor, b: Tensor, op: str) -> Tensor:
    """Bitwise `and`, `andnot` (a and not b), `or`, `xor` of two int32 tensors of bit words of the same length."""
    if op not in MASK_OPS:
        raise ValueError(f"op must be one of {', '.join(MASK_OPS)}, got {op!r}")
    if a.dtype != torch.int32 or b.dtype != torch.int32 or a.shape != b.shape:
        raise ValueError(
            f"mask_op wants two int32 tensors of one shape, got {a.dtype} {tuple(a.shape)} and {b.dtype} "
            f"{tuple(b.shape)}"
        )
    if a.device != b.device or not a.is_contiguous() or not b.is_contiguous():
        raise ValueError(f"mask_op wants contiguous words on one device, got {a.device} and {b.device}")
    return backend(a.device).mask_op(a, b, op) if a.numel() else a.clone()


def popcount(words: Tensor) -> Tensor:
    """Number of set bits in int32 words, as an int64 device scalar."""
    if words.dtype != torch.int32:
        raise ValueError(f"popcount wants int32 words, got {words.dtype}")
    if not words.is_contiguous():
        raise ValueError(f"popcount wants contiguous words, got strides {words.stride()}")
    return backend(words.device).popcount(words) if words.numel() else words.sum()


def _check_dense(name: str, tensor: Tensor, index: TileIndex, origin: int = 0, whole: bool = True) -> None:
    if tensor.dtype not in FLOATS or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a flat contiguous bf16, fp16 or fp32 tensor, got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}"
        )
    if whole and tensor.numel() != index.numel:
        raise ValueError(f"{name} has {tensor.numel()} elements, its index describes {index.numel}")
    if origin + tensor.numel() > index.numel:
        raise ValueError(
            f"{name} covers {origin}:{origin + tensor.numel()}, its index describes {index.numel} elements"
        )
    if tensor.device != index.base.device:
        raise ValueError(f"{name} lies on {tensor.device}, its index on {index.base.device}")


def _check_compact(name: str, tensor: Tensor, length: int, beside: Tensor, exact: bool = False) -> None:
    if tensor.dtype not in FLOATS or tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device != beside.device:
        raise ValueError(
            f"{name} must be a flat contiguous bf16, fp16 or fp32 tensor on {beside.device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    if tensor.numel() < length or (exact and tensor.numel() != length):
        raise ValueError(f"{name} needs {length} entries, got {tensor.numel()}")


def _check_step(
    weights: Tensor,
    gradient: Tensor,
    index: TileIndex,
    scalars: Tensor,
    num_scalars: int,
    compact: bool,
    **state: Tensor,
) -> None:
    _check_dense("weights", weights, index)
    if compact:
        _check_compact("gradient", gradient, index.offset.numel(), weights)
    else:
        _check_dense("gradient", gradient, index)
    if scalars.shape != (num_scalars,) or scalars.dtype != torch.float32 or scalars.device != weights.device:
        raise ValueError(
            f"scalars must be fp32 of shape ({num_scalars},) on {weights.device}, got {scalars.dtype} of shape "
            f"{tuple(scalars.shape)} on {scalars.device}"
        )
    for name, tensor in state.items():
        _check_compact(name, tensor, index.offset.numel(), weights)
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be fp32, got {tensor.dtype}")


def _check_pull(pull: Pull | None, length: int, beside: Tensor, exact: bool = False) -> None:
    if pull is None:
        return
    _check_compact("pull.old", pull.old, length, beside, exact)
    _check_compact("pull.importance", pull.importance, length, beside, exact)
    if pull.importance.dtype == torch.float16:
        raise ValueError("pull.importance must be bf16 or fp32, got torch.float16: fp16 does not reach far enough")
    _check_scalar("pull.rate", pull.rate, beside)


def _check_rounding(rounding: Tensor | None, origin: int, weights: Tensor) -> None:
    if rounding is None:
        if origin:
            raise ValueError(
                f"origin={origin} only counts for stochastic rounding: give a rounding key, or leave it out"
            )
        return
    if rounding.numel() != 1 or rounding.dtype != torch.int64 or rounding.device != weights.device:
        raise ValueError(
            f"rounding must be one int64 key on {weights.device}, got {rounding.dtype} of shape "
            f"{tuple(rounding.shape)} on {rounding.device}; rounding_key makes it"
        )
    if weights.dtype != torch.bfloat16:
        raise ValueError(f"only bf16 weights can be rounded stochastically, got {weights.dtype}; leave rounding out")


def _check_span(index: TileIndex, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= index.num_active:
        raise ValueError(f"entries {start}:{stop} lie outside the index of {index.num_active} active entries")


def _check_scalar(name: str, value: Tensor, beside: Tensor) -> None:
    if value.numel() != 1 or value.dtype != torch.float32 or value.device != beside.device:
        raise ValueError(
            f"{name} must be one fp32 value on {beside.device}, got {value.dtype} of shape {tuple(value.shape)} on "
            f"{value.device}"
        )


def _check_numbers(**numbers: float) -> None:
    for name, number in numbers.items():
        limit = 1.0 if name in ("beta1", "beta2", "alpha") else math.inf
        if not 0 <= number < limit:
            raise ValueError(f"{name} must be in [0, {limit:g}), got {number}")


def _checked_lr(lr: float | Tensor) -> float | Tensor:
    """A device value is taken as it is; reading it back would stop the device."""
    if isinstance(lr, Tensor):
        return lr.reshape(())
    _check_numbers(lr=lr)
    return lr

"""Where the entries of a checkpoint's tensors lie in the memory of a running model.

A server's parameters are fused (q, k and v in one matrix) and cut over ranks, and only the model's own `load_weights`
knows how. So it is asked: it loads a tensor that is never read, and every copy it would make is recorded, as a view of
the checkpoint's tensor and a view of the model's memory, and not done. The two views give the place of any entry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lota.delivery.stacking import Entries


class NotPlainError(Exception):
    """The model does not hold the tensor as the checkpoint has it: packed, quantized, or computed from several."""


@dataclass(frozen=True)
class Copy:
    """A copy that the loader makes. offset, strides: of the piece in the checkpoint's contiguous tensor, in elements;
    target: the view of the model's memory that receives it, of the same shape."""

    offset: int
    strides: tuple[int, ...]
    target: Tensor


def record_copies(
    load: Callable[[Iterable[tuple[str, Tensor]]], Any], name: str, shape: Sequence[int], dtype: torch.dtype
) -> list[Copy]:
    """What `load` would copy of a checkpoint's tensor, and where to; nothing is written.

    load: a model's `load_weights`. None at all where this rank holds nothing of the tensor. NotPlainError where it does
    anything but copy pieces.
    """
    source = torch.empty(tuple(shape), dtype=dtype)  # memory that is never touched takes no room
    with torch.no_grad(), _Recorder(source) as recorder:
        try:
            load([(name, source)])
        except Exception as error:
            raise NotPlainError(f"{name}: {type(error).__name__} {error}") from error
    return recorder.copies


_FILLS = (torch.ops.aten.fill_.Scalar, torch.ops.aten.zero_.default)


class _Recorder(TorchDispatchMode):
    """Records copies out of `source`; any other write is an error, before it happens."""

    def __init__(self, source: Tensor) -> None:
        super().__init__()
        self.copies: list[Copy] = []
        self._source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            target, piece = args[0], args[1]
            if piece.untyped_storage().data_ptr() != self._source.untyped_storage().data_ptr():
                raise NotPlainError("the loader changes the tensor before it copies it")
            if target.shape != piece.shape or not target.is_floating_point():
                raise NotPlainError(f"{tuple(piece.shape)} goes to {target.dtype} {tuple(target.shape)}")
            self.copies.append(Copy(piece.storage_offset(), tuple(piece.stride()), target.detach()))
            return target
        if func in _FILLS and args[1:] in ((), (0,)):
            return args[0]  # padding, which no entry of the checkpoint is in
        if func._schema.is_mutable or func is torch.ops.aten._local_scalar_dense.default:
            raise NotPlainError(f"the loader uses {func}")
        return func(*args, **(kwargs or {}))


def place(copy: Copy, entries: Entries) -> Entries:
    """Those of a tensor's entries that the copy has, by their positions in the memory that its target lies in.

    entries: by flat positions in the checkpoint's tensor, on the CPU. Values are cast to the memory's dtype, as the
    copy does. NotPlainError where that memory holds anything but their base values, bit for bit.
    """
    where, is_inside = _in_target(copy, entries.positions)
    memory = whole_memory(copy.target)
    at = where[is_inside].to(memory.device)
    values, base = (tensor[is_inside].to(memory.device, memory.dtype) for tensor in (entries.values, entries.base))
    if not _same_bits(memory[at], base):
        raise NotPlainError("the model's memory does not hold the base's values in this order")
    return Entries(at.to(torch.int32) if memory.numel() < 1 << 31 else at, values, base)


def _in_target(copy: Copy, positions: Tensor) -> tuple[Tensor, Tensor]:
    """By flat position of the checkpoint's tensor: the place in the target's memory, and whether the copy has it."""
    rest = positions - copy.offset
    is_inside = rest >= 0
    where = torch.full_like(rest, int(copy.target.storage_offset()))
    dims = [
        (stride, size, target)
        for size, stride, target in zip(copy.target.shape, copy.strides, copy.target.stride(), strict=True)
        if size != 1
    ]
    for stride, size, target in sorted(dims, reverse=True):
        if stride <= 0:
            raise NotPlainError("the loader repeats entries of the tensor")
        index = rest.div(stride, rounding_mode="floor")
        is_inside &= index < size
        where += index * target
        rest = rest - index * stride
    return where, is_inside & (rest == 0)


def whole_memory(tensor: Tensor) -> Tensor:
    """All of the memory that a tensor is a view of, 1-D, in its dtype."""
    storage = tensor.untyped_storage()
    numel = storage.nbytes() // tensor.element_size()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (numel,), (1,))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.dtype.itemsize]
    return one.dtype == other.dtype and torch.equal(one.view(bits), other.view(bits))

"""What differs between two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lota.algebra.models import ModelTensors
from lota.delivery.rewrite import changed_positions, same_bits
from lota.progress import Say, silent, tracked


@dataclass(frozen=True)
class TensorDiff:
    """One tensor. kind: equal (every bit), changed, shape, dtype, only in A, only in B. num_changed: entries whose bits
    differ. largest: of |B - A|, in fp32; None where they cannot be subtracted. a, b: dtype and shape on each side."""

    name: str
    kind: str
    numel: int
    num_changed: int = 0
    largest: float | None = None
    a: str = ""
    b: str = ""

    @property
    def share(self) -> float:
        return self.num_changed / self.numel if self.numel else 0.0


def diff(a: ModelTensors, b: ModelTensors, say: Say = silent) -> Iterator[TensorDiff]:
    """One after another, in the order of A, then what only B has. One tensor of each is in memory."""
    in_b = set(b.names)
    for name in tracked(a.names, "compared", say):
        one = a.read(name)
        if name not in in_b:
            yield TensorDiff(name, "only in A", one.numel(), a=_about(one))
            continue
        yield _compare(name, one, b.read(name))
    in_a = set(a.names)
    for name in b.names:
        if name not in in_a:
            other = b.read(name)
            yield TensorDiff(name, "only in B", other.numel(), b=_about(other))


def _compare(name: str, one: Tensor, other: Tensor) -> TensorDiff:
    a, b = _about(one), _about(other)
    if one.shape != other.shape:
        return TensorDiff(name, "shape", one.numel(), a=a, b=b)
    if one.dtype != other.dtype:
        largest = float((other.float() - one.float()).abs().max()) if one.numel() else 0.0
        return TensorDiff(name, "dtype", one.numel(), largest=largest, a=a, b=b)
    if same_bits(one, other):
        return TensorDiff(name, "equal", one.numel(), a=a, b=b)
    where = changed_positions(one, other)
    first, second = one.reshape(-1)[where].float(), other.reshape(-1)[where].float()
    return TensorDiff(
        name, "changed", one.numel(), where.numel(), float((second - first).abs().nan_to_num(torch.inf).max()), a=a, b=b
    )


def _about(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

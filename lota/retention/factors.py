"""Squared gradients of a tensor, added up over micro-batches: as two vectors a matrix, and exactly at a mask's entries.

With G the gradient of a micro-batch's mean loss by a matrix, the diagonal of the empirical Fisher is F = mean of G * G.
Its row sums R, column sums C and total S give the estimate R_i C_j / S. Of all estimates that are a product of two
vectors it is the closest to F in generalised Kullback-Leibler divergence (Shazeer and Stern, Adafactor, arXiv
1804.04235), and the only one with the same row and column sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lota.kernels import TileIndex, gather
from lota.ticket import Mask

_CHUNK = 1 << 24


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """A tensor as `number` matrices of `rows` x `columns`: the last two dimensions, or one column for a vector. Fused
    experts `[experts, out, in]` are a matrix each."""
    if len(shape) < 2:
        return 1, math.prod(shape), 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


class SquareSums:
    """Row and column sums of squared gradients of one tensor: float64 `[number * rows]` and `[number * columns]`."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.number, self.num_rows, self.num_columns = matrices(shape)
        self.rows = torch.zeros(self.number * self.num_rows, dtype=torch.float64, device=device)
        self.columns = torch.zeros(self.number * self.num_columns, dtype=torch.float64, device=device)

    def add(self, gradient: Tensor) -> None:
        """Add the squares of a gradient (any float dtype, the whole tensor). Squares are fp32, sums float64."""
        if not gradient.numel():
            return
        whole = gradient.detach().reshape(self.number, self.num_rows, self.num_columns)
        rows = self.rows.view(self.number, self.num_rows)
        columns = self.columns.view(self.number, self.num_columns)
        step = max(1, _CHUNK // self.num_columns)
        for matrix in range(self.number):
            for first in range(0, self.num_rows, step):
                squares = whole[matrix, first : first + step].float().square()
                rows[matrix, first : first + step] += squares.sum(1, dtype=torch.float64)
                columns[matrix] += squares.sum(0, dtype=torch.float64)

    def add_(self, other: SquareSums, factor: Tensor) -> None:
        """Add `factor` (a float64 device scalar) times what another one holds."""
        self.rows += other.rows * factor
        self.columns += other.columns * factor

    def zero_(self) -> None:
        self.rows.zero_()
        self.columns.zero_()

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.columns.nbytes


class ExactSums:
    """Sums of squared gradients at a mask's active entries: fp32 `[active]` a tensor, 4 bytes an entry on every rank.

    devices: where each tensor's gradient appears; tensors of the mask that it does not name stay 0.
    """

    def __init__(self, mask: Mask, devices: Mapping[str, torch.device]) -> None:
        self.mask = mask
        self.values = {
            name: torch.zeros(mask.active(name), dtype=torch.float32, device=devices.get(name, torch.device("cpu")))
            for name in mask.names
        }
        self._indices: dict[str, TileIndex] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the squares of a gradient (any float dtype, the whole tensor) at the mask's entries."""
        if name not in self.values or not self.mask.active(name):
            return
        if name not in self._indices:
            self._indices[name] = TileIndex.from_pieces(
                self.mask.chunks(name), self.mask.active(name), gradient.numel(), gradient.device
            )
        found = gather(gradient.detach().reshape(-1), self._indices[name])
        self.values[name].addcmul_(found, found)

    def add_(self, other: ExactSums, factor: Tensor) -> None:
        """Add `factor` (a float64 device scalar) times what another one holds."""
        for name, values in self.values.items():
            values += other.values[name] * factor

    def zero_(self) -> None:
        for values in self.values.values():
            values.zero_()

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.values.values())


def at(shape: Sequence[int], rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    """R_i C_j / S of the matrix of every flat position (int64): fp32, as long as `positions`; 0 where S is 0.

    rows, columns: fp32, as `SquareSums` lays them out.
    """
    number, num_rows, num_columns = matrices(shape)
    totals = rows.view(number, num_rows).sum(1, dtype=torch.float64).float()
    line = positions // max(num_columns, 1)
    matrix = line // max(num_rows, 1)
    columns_at = columns[matrix * num_columns + positions % max(num_columns, 1)]
    total = totals[matrix]
    # One division first: the product of two small numbers could be below fp32's range.
    return torch.where(total > 0, rows[line] / total, 0.0) * columns_at

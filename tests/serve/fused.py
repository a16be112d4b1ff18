"""A model as servers hold it: q, k and v in one matrix, gate and up in another, both cut over ranks; without vLLM."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_FUSED = {"q_proj": ("qkv", 0), "k_proj": ("qkv", 1), "v_proj": ("qkv", 2), "gate_proj": ("gate_up", 0)}
_FUSED |= {"up_proj": ("gate_up", 1)}


class FusedModel(nn.Module):
    """One rank's parameters of a Llama checkpoint. Rows of fused matrices and columns of o_proj and down_proj are cut;
    the others are whole. Filled with NaN until it is loaded."""

    def __init__(self, checkpoint: dict[str, Tensor], rank: int = 0, num_ranks: int = 1) -> None:
        super().__init__()
        self.rank, self.num_ranks = rank, num_ranks
        self.shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
        sizes: dict[str, list[int]] = {}
        for name, tensor in checkpoint.items():
            fused, _ = self._fused(name)
            rows, *columns = tensor.shape
            if fused != name:
                rows //= num_ranks
            elif self._is_row_cut(name):
                columns = [columns[0] // num_ranks]
            sizes.setdefault(fused, [0, *columns])[0] += rows
        dtype = next(iter(checkpoint.values())).dtype
        for name, size in sizes.items():
            parameter = nn.Parameter(torch.full(size, torch.nan, dtype=dtype), requires_grad=False)
            self.register_parameter(name.replace(".", "/"), parameter)

    @staticmethod
    def _fused(name: str) -> tuple[str, int]:
        part = name.split(".")[-2]
        fused, place = _FUSED.get(part, (part, 0))
        return name.replace(f".{part}.", f".{fused}."), place

    @staticmethod
    def _is_row_cut(name: str) -> bool:
        return "o_proj" in name or "down_proj" in name

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            fused, place = self._fused(name)
            target = getattr(self, fused.replace(".", "/")).data
            if fused != name:
                rows = tensor.shape[0] // self.num_ranks
                tensor = tensor.narrow(0, self.rank * rows, rows)
                before = [other for other in self.shapes if self._fused(other) in [(fused, p) for p in range(place)]]
                start = sum(self.shapes[other][0] // self.num_ranks for other in before)
                target = target.narrow(0, start, rows)
            elif self._is_row_cut(name):
                columns = target.shape[1]
                tensor = tensor[:, self.rank * columns : (self.rank + 1) * columns]
            assert target.shape == tensor.shape
            target.copy_(tensor)

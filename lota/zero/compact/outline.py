"""A mask without its indices: what every rank needs of it once training runs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from lota.ticket import BaseTensor, Mask


class MaskOutline:
    """Names, shapes, counts and identity of a mask: a few hundred bytes a tensor, none of the indices.

    eligible: as of the mask. num_dense: entries of tensors that are trained whole. nbytes: of indices, so 0.
    AttributeError for the rest of a mask's methods, which says where the indices are.
    """

    def __init__(self, mask: Mask) -> None:
        self._rows = {name: (mask.shape(name), mask.numel(name), mask.active(name)) for name in mask.names}
        self.eligible = mask.eligible
        self.num_dense = sum(mask.active(name) for name in mask.names if mask.is_dense(name))
        self.base: dict[str, BaseTensor] = mask.base
        self.digest, self.origin, self.nbytes = mask.digest, mask.origin, 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._rows)

    @property
    def num_active(self) -> int:
        return sum(active for _, _, active in self._rows.values())

    @property
    def density(self) -> float:
        return self.num_active / self.eligible if self.eligible else 0.0

    def shape(self, name: str) -> tuple[int, ...]:
        return self._rows[name][0]

    def numel(self, name: str) -> int:
        return self._rows[name][1]

    def active(self, name: str) -> int:
        return self._rows[name][2]

    def with_base(self, base: Mapping[str, BaseTensor]) -> MaskOutline:
        """The same outline with `base` for its tensors."""
        made = copy.copy(self)
        made.base = {name: base[name] for name in self._rows}
        return made

    def __repr__(self) -> str:
        return f"MaskOutline({len(self._rows)} tensors, {self.num_active} of {self.eligible} active)"

    def __getattr__(self, name: str) -> Any:
        if hasattr(Mask, name):
            raise AttributeError(
                f"{name} is for the mask with its indices, which only rank 0 keeps once the engine is built: ask it, "
                "or keep the mask that was given to sparse_zero3"
            )
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

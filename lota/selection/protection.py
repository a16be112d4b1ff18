"""Entries that must not be chosen: the union of given masks over the tensors of a selection (LoTTO)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lota.ticket import BaseTensor, Mask
from lota.ticket.fingerprint import add


class Protection:
    """The union of masks, decoded for one tensor at a time; the same on every rank, without talking.

    A mask may name tensors that this selection leaves out (they are frozen anyway) and may lack some that it has.
    ValueError: not a Mask, another shape, or a base that is known on both sides and differs.
    """

    def __init__(
        self,
        masks: Sequence[Mask],
        shapes: Mapping[str, Sequence[int]],
        base: Mapping[str, BaseTensor] | None = None,
        spans: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        """spans: of every tensor the flat stretch that takes part; what lies outside counts as protected."""
        if isinstance(masks, Mask) or not all(isinstance(mask, Mask) for mask in masks):
            raise ValueError("protect must be a sequence of Mask, got something else. Pass [ticket.mask, ...].")
        self._numels = {name: math.prod(shape) for name, shape in shapes.items()}
        self._masks: dict[str, list[Mask]] = {name: [] for name in shapes}
        spans = spans or {name: (0, numel) for name, numel in self._numels.items()}
        self._spans = {name: spans[name] for name, numel in self._numels.items() if spans[name] != (0, numel)}
        self._decoded: tuple[str, Tensor] | None = None
        for number, mask in enumerate(masks):
            for name in mask.names:
                if name not in shapes:
                    continue
                if tuple(mask.shape(name)) != tuple(shapes[name]):
                    raise ValueError(
                        f"protect[{number}] has {name} with shape {tuple(mask.shape(name))}, expected "
                        f"{tuple(shapes[name])}. It was made for another model."
                    )
                if base is not None and name in mask.base and not _carries(masks, mask, name, base[name]):
                    mask.check_base(name, tuple(shapes[name]), base[name].dtype, base[name].fingerprint)
                if mask.active(name):
                    self._masks[name].append(mask)

    def num_free(self, name: str) -> int:
        """Entries of the tensor that no mask protects."""
        masks = self._masks[name]
        if name in self._spans and not masks:
            start, stop = self._spans[name]
            return stop - start
        if len(masks) == 1 and name not in self._spans:
            return self._numels[name] - masks[0].active(name)
        return int(self._free(name).sum()) if masks else self._numels[name]

    def free(self, name: str, start: int, stop: int, device: torch.device) -> Tensor | None:
        """bool [stop - start], False where protected; None when nothing of this tensor is."""
        is_restricted = bool(self._masks[name]) or name in self._spans
        return self._free(name)[start:stop].to(device) if is_restricted else None

    def _free(self, name: str) -> Tensor:
        if self._decoded is None or self._decoded[0] != name:
            self._decoded = None  # never two tensors at once
            free = torch.ones(self._numels[name], dtype=torch.bool, device="cpu")
            if name in self._spans:
                start, stop = self._spans[name]
                free[:start] = free[stop:] = False
            for mask in self._masks[name]:
                for chunk in mask.chunks(name):
                    free[chunk] = False
            self._decoded = name, free
        return self._decoded[1]


def _carries(masks: Sequence[Mask], mask: Mask, name: str, found: BaseTensor) -> bool:
    """Whether a tensor is that mask's base with some of the masks' tickets applied: earlier tasks of a sequence, whose
    entries are protected, are in the model that the next one starts from."""
    base = mask.base[name]
    if base.dtype != found.dtype or base.rows is not None:
        return False
    wanted = add(int(found.fingerprint, 16), -int(base.fingerprint, 16))
    changes = [change for other in masks if name in other.names and (change := other.change(name)) is not None]
    sums = {0}
    for change in changes[:_MOST_APPLIED]:
        sums |= {add(part, change) for part in sums}
    return wanted in sums


_MOST_APPLIED = 16
"""Tickets of which any that are on the model are tried: all their sums are."""

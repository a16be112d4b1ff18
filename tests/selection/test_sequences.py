"""Earlier tasks of a sequence are on the base of the next one: their tickets protect their entries there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lota.selection.protection import Protection
from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex


def identity(weight: torch.Tensor) -> BaseTensor:
    return BaseTensor(str(weight.dtype).removeprefix("torch."), to_hex(fingerprint(weight.flatten())))


def make(path: Path, weight: torch.Tensor, chosen: torch.Tensor, value: float) -> Mask:
    mask = Mask.from_dense({"w": chosen}, {"w": identity(weight)})
    before = weight[chosen]
    Ticket(mask, {"w": torch.full_like(before, value)}, {"w": before}).save(path)
    return Mask.load(path)


def applied(weight: torch.Tensor, mask: Mask, value: float) -> torch.Tensor:
    weight = weight.clone()
    weight[mask.dense("w")] = value
    return weight


def test_masks_protect_on_a_base_that_carries_their_tickets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = torch.randn(20, 30).bfloat16()
    places = torch.rand(20, 30)
    first = make(tmp_path / "a", base, places < 0.2, 1.0)
    after_first = applied(base, first, 1.0)
    second = make(tmp_path / "b", after_first, (places >= 0.2) & (places < 0.4), 2.0)  # trained on base + first
    beside = make(tmp_path / "c", base, places > 0.7, 3.0)  # trained on the base alone
    after_second = applied(after_first, second, 2.0)
    everything = applied(after_second, beside, 3.0)
    shapes = {"w": (20, 30)}
    for weight, masks in (
        (base, [first, beside]),
        (after_first, [first]),
        (after_second, [first, second]),
        (everything, [first, second, beside]),
    ):
        free = Protection(masks, shapes, {"w": identity(weight)}).num_free("w")
        assert free == 600 - sum(mask.num_active for mask in masks)
    other = everything.clone()
    other[0, 0] += 1
    for weight, masks in ((other, [first, second, beside]), (everything, [first, second]), (after_second, [first])):
        with pytest.raises(ValueError, match="another base model or revision"):
            Protection(masks, shapes, {"w": identity(weight)})
    # A mask alone does not know what its ticket changed.
    with pytest.raises(ValueError, match="another base model or revision"):
        Protection([Mask.from_dense({"w": first.dense("w")}, first.base)], shapes, {"w": identity(after_first)})

"""Protected entries are never chosen, the exact count is still reached, and too large a budget says what is left."""

from __future__ import annotations

import pytest
import torch

from lota.selection import select
from lota.ticket import BaseTensor, Mask
from tests.selection.oracle import chosen, pieces_of, positions_of

GENERATOR = torch.Generator().manual_seed(0)
SCORES = {
    "a": torch.randint(-4, 5, (17, 11), generator=GENERATOR).float(),
    "b": torch.randn(3, 40, generator=GENERATOR),
    "c": torch.randn(64, generator=GENERATOR).bfloat16(),
}


def _random_mask(density, seed, names="abc"):
    generator = torch.Generator().manual_seed(seed)
    return Mask.from_dense({name: torch.rand(SCORES[name].shape, generator=generator) < density for name in names})


def _entries(*masks):
    return {(name, flat) for mask in masks for name in mask.names for flat in mask.indices(name).tolist()}


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.4])
@pytest.mark.parametrize(
    "masks",
    [
        [_random_mask(0.4, 1)],
        [_random_mask(0.3, 1), _random_mask(0.3, 2)],
        [_random_mask(0.5, 3, names="b")],
        [_random_mask(0, 1)],
    ],
    ids=["one", "two that overlap", "of one tensor", "empty"],
)
def test_equals_a_sort_of_what_is_left(masks, density, budget):
    pieces, shapes = pieces_of(SCORES)
    mask = select(pieces, shapes, density=density, budget=budget, protect=masks).mask
    assert positions_of(mask) == chosen(SCORES, density, budget, protected=_entries(*masks))
    assert all(mask.overlap(protected) == 0 for protected in masks)


def test_tickets_in_sequence_share_nothing_until_the_model_is_full():
    pieces, shapes = pieces_of(SCORES)
    made: list[Mask] = []
    for _ in range(4):
        made.append(select(pieces, shapes, density=0.24, protect=made).mask)
    sizes = [mask.num_active for mask in made]
    assert sizes == [round(0.24 * 371)] * 4
    assert len(_entries(*made)) == sum(sizes)
    with pytest.raises(ValueError, match=r"asks for 16 of 371 eligible entries, but protected tickets leave only 15\."):
        select(pieces, shapes, density=0.0432, protect=made)


def test_too_large_a_budget_says_what_is_left_and_what_fits():
    pieces, shapes = pieces_of({"w": torch.randn(1000)})
    protected = Mask.from_dense({"w": torch.arange(1000) < 700})
    message = r"asks for 301 of 1000 eligible entries, but protected tickets leave only 300\. .* that fits is 0\.3\."
    with pytest.raises(ValueError, match=message):
        select(pieces, shapes, density=0.301, protect=[protected])
    assert select(pieces, shapes, density=0.3, protect=[protected]).mask.indices("w").tolist() == list(range(700, 1000))
    everything = Mask.from_dense({"w": torch.ones(1000, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"leave only 0\. Nothing is left to choose"):
        select(pieces, shapes, density=0.1, protect=[everything])


@pytest.mark.parametrize("num_left", [1, 3, 7, 1234, 99_999])
def test_the_density_that_is_said_to_fit_does(num_left):
    pieces, shapes = pieces_of({"w": torch.ones(100_003)})
    protected = Mask.from_dense({"w": torch.arange(100_003) >= num_left})
    with pytest.raises(ValueError, match=f"leave only {num_left}") as raised:
        select(pieces, shapes, density=1.0, protect=[protected])
    fits = float(str(raised.value).split("fits is ")[1].rstrip("."))
    assert select(pieces, shapes, density=fits, protect=[protected]).num_active == num_left


def test_per_tensor_names_the_tensor_that_is_short():
    pieces, shapes = pieces_of(SCORES)
    protected = Mask.from_dense({"b": torch.ones(3, 40, dtype=torch.bool).index_fill(0, torch.tensor(1), False)})
    with pytest.raises(ValueError, match=r"48 of 120 entries of b, but .* leave only 40 .*budget=\"global\""):
        select(pieces, shapes, density=0.4, budget="per_tensor", protect=[protected])
    assert select(pieces, shapes, density=0.4, protect=[protected]).num_active == round(0.4 * 371)


def test_nan_is_refused_under_protection_too():
    pieces, shapes = pieces_of({"w": torch.tensor([float("nan"), 1, 2, 3])})
    protected = Mask.from_dense({"w": torch.tensor([True, False, False, False])})
    with pytest.raises(ValueError, match="got 1 NaN in w"):
        select(pieces, shapes, density=0.5, protect=[protected])


def test_zero_everywhere_but_under_protection_is_all_zero():
    pieces, shapes = pieces_of({"w": torch.tensor([5.0, 0, 0, 0])})
    protected = Mask.from_dense({"w": torch.tensor([True, False, False, False])})
    with pytest.raises(ValueError, match="got 0 for all that may be chosen"):
        select(pieces, shapes, density=0.5, protect=[protected])


def test_tensors_that_are_not_eligible_may_be_protected():
    pieces, shapes = pieces_of({"w": torch.arange(4.0)})
    elsewhere = Mask.from_dense({"norm": torch.ones(9, dtype=torch.bool)})
    assert select(pieces, shapes, density=0.5, protect=[elsewhere]).mask.indices("w").tolist() == [2, 3]


def test_another_shape_is_refused():
    pieces, shapes = pieces_of({"w": torch.ones(4, 2)})
    other = Mask.from_dense({"w": torch.ones(2, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"protect\[0\] has w with shape \(2, 4\), expected \(4, 2\)"):
        select(pieces, shapes, density=0.5, protect=[other])


def test_base_is_checked_and_stored():
    pieces, shapes = pieces_of({"w": torch.arange(8.0)})
    ours = {"w": BaseTensor("bfloat16", "0123456789abcdef"), "not eligible": BaseTensor("bfloat16", "f" * 16)}
    theirs = {"w": BaseTensor("bfloat16", "fedcba9876543210")}
    first = select(pieces, shapes, density=0.25, base=ours).mask
    assert first.base == {"w": ours["w"]}
    assert select(pieces, shapes, density=0.25, base=ours, protect=[first]).mask.indices("w").tolist() == [4, 5]
    foreign = Mask.from_dense({"w": torch.arange(8) < 2}, base=theirs)
    with pytest.raises(ValueError, match="w"):
        select(pieces, shapes, density=0.25, base=ours, protect=[foreign])

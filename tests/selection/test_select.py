"""Selection equals a brute-force sort, takes exactly what was asked, and nests; ties follow no order of position."""

from __future__ import annotations

import itertools

import pytest
import torch

from lota.selection import select, topk, workers
from lota.ticket import Mask
from tests.selection.oracle import chosen, pieces_of, positions_of

SHAPES = {"one": (1,), "matrix": (16, 14), "none": (0, 4), "experts": (3, 5, 7), "odd": (31, 3)}


def _normal(shape, generator):
    return torch.randn(shape, generator=generator)


def _few_values(shape, generator):
    return torch.randint(-3, 4, shape, generator=generator).float()


def _mostly_zero(shape, generator):
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.1)


def _with_infinities(shape, generator):
    values = torch.randn(shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.2] = float("inf")
    values[torch.rand(shape, generator=generator) < 0.2] = float("-inf")
    return values


def _tiny(shape, generator):
    """Subnormal numbers, signed zeros, and neighbours that differ in the last bit."""
    bits = torch.randint(0, 5, shape, generator=generator, dtype=torch.int32)
    values = bits.view(torch.float32)
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -values, values)


KINDS = [_normal, _few_values, _mostly_zero, _with_infinities, _tiny]


def _scores(kind, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: kind(shape, generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture(params=["whole", "chunked", "threads"])
def chunking(request, monkeypatch):
    """Everything in one chunk; or chunks of 7 and ties narrowed by a radix pass, on one thread and on three."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param == "threads" else 1)
    if request.param != "whole":
        monkeypatch.setattr(topk, "_CPU_CHUNK", 7)
        monkeypatch.setattr(topk, "MAX_GATHERED_TIES", 2)
        monkeypatch.setattr(workers, "_MIN_PART", 10)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.005, 0.1, 0.5, 0.97, 1.0])
def test_equals_a_sort(chunking, kind, density, budget):
    scores = _scores(kind)
    pieces, shapes = pieces_of(scores)
    selection = select(pieces, shapes, density=density, budget=budget, seed=5)
    expected = chosen(scores, density, budget, seed=5)
    assert positions_of(selection.mask) == expected
    magnitudes = torch.cat([scores[name].flatten()[expected[name]].abs() for name in scores])
    assert selection.num_active == magnitudes.numel() == sum(selection.per_tensor.values())
    assert selection.eligible == 423
    assert selection.density == selection.num_active / 423
    assert selection.threshold == magnitudes.min()
    assert selection.num_zero_scored == int((magnitudes == 0).sum())
    assert selection.mask.shape("experts") == (3, 5, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_rank_as_fp32(dtype):
    scores = _scores(_normal, dtype=dtype)
    pieces, shapes = pieces_of(scores)
    assert positions_of(select(pieces, shapes, density=0.3).mask) == chosen(scores, 0.3)


@pytest.mark.parametrize("numel", [3 * (1 << 18), (1 << 19) + 1])
@pytest.mark.parametrize("density", [0.013, 0.5])
def test_several_full_chunks_equal_torch_topk(numel, density):
    scores = torch.randperm(numel, generator=torch.Generator().manual_seed(0)).float() - 1000
    mask = select(lambda: [("w", 0, scores)], {"w": (numel,)}, density=density).mask
    expected = torch.topk(scores.abs(), round(density * numel)).indices.sort().values
    assert torch.equal(mask.indices("w"), expected)


def test_scores_that_need_grad_or_stride_are_read_as_they_are():
    wide = torch.randn(40, 2, requires_grad=True)
    mask = select(lambda: [("w", 0, wide[:, 1])], {"w": (40,)}, density=0.25).mask
    assert positions_of(mask) == chosen({"w": wide[:, 1].detach()}, 0.25)


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_density_is_nested(kind, budget):
    pieces, shapes = pieces_of(_scores(kind))
    masks = [select(pieces, shapes, density=d, budget=budget).mask for d in (0.9, 0.5, 0.49, 0.1, 0.01)]
    for larger, smaller in itertools.pairwise(masks):
        assert 0 < smaller.overlap(larger) == smaller.num_active < larger.num_active


def test_ties_spread_over_tensors():
    names = [f"layer{number}" for number in range(50)]
    pieces, shapes = pieces_of({name: torch.ones(100, 20) for name in names})
    selection = select(pieces, shapes, density=0.1)
    # Binomial(2000, 0.1) has a deviation of 13.4: six of them either side. By position the first five would hold all.
    assert all(120 < count < 280 for count in selection.per_tensor.values())
    assert selection.num_active == 10_000
    assert selection.num_tied == 100_000
    halves = [int((selection.mask.indices(name) < 1000).sum()) for name in names]
    assert 4700 < sum(halves) < 5300


def test_seed_moves_ties_and_nothing_else():
    scores = {"w": torch.cat([torch.full((100,), 2.0), torch.ones(900)])}
    pieces, shapes = pieces_of(scores)
    first, again, other = (select(pieces, shapes, density=0.2, seed=seed).mask for seed in (0, 0, 1))
    assert first == again
    assert 100 < first.overlap(other) < 200
    assert all(mask.indices("w")[:100].tolist() == list(range(100)) for mask in (first, other))


def test_facts_say_what_was_tied_and_what_was_zero():
    pieces, shapes = pieces_of({"w": torch.tensor([3.0, -2, 2, 2, 0, 0, 0, 0, 0, 0])})
    facts = select(pieces, shapes, density=0.2).facts()
    assert facts == {
        "num_active": 2,
        "eligible": 10,
        "density": 0.2,
        "threshold": 2.0,
        "num_tied": 3,
        "num_zero_scored": 0,
    }
    assert select(pieces, shapes, density=0.4).num_tied == 0  # all that tied were taken: nothing was arbitrary
    beyond = select(pieces, shapes, density=0.6)
    assert (beyond.threshold, beyond.num_tied, beyond.num_zero_scored) == (0.0, 6, 2)


@pytest.mark.parametrize(
    ("budget", "kind", "calls"),
    [("global", _normal, 3), ("global", _few_values, 4), ("per_tensor", _normal, 1), ("per_tensor", _few_values, 1)],
)
def test_scores_are_recomputed_as_rarely_as_promised(budget, kind, calls):
    pieces, shapes = pieces_of(_scores(kind))
    called = []
    select(lambda: called.append(1) or pieces(), shapes, density=0.3, budget=budget)
    assert len(called) == calls


@pytest.mark.parametrize("has_error", [False, True])
def test_torch_has_its_threads_while_scores_are_computed_and_afterwards(has_error):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    seen = []

    def pieces():
        seen.append(torch.get_num_threads())
        yield "w", 0, torch.full((10,), float("nan")) if has_error else torch.arange(10.0)
        seen.append(torch.get_num_threads())

    try:
        select(pieces, {"w": (10,)}, density=0.5)
    except ValueError:
        assert has_error
    assert set(seen) == {3}
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("budget", ["global", "per_tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerator_chooses_what_the_cpu_chooses(kind, budget):
    scores = _scores(kind)
    pieces, shapes = pieces_of(scores)
    there, _ = pieces_of({name: values.cuda() for name, values in scores.items()})
    expected = select(pieces, shapes, density=0.3, budget=budget)
    assert select(there, shapes, density=0.3, budget=budget, protect=()).mask == expected.mask
    earlier = select(pieces, shapes, density=0.02, budget=budget).mask  # so few that scores above 0 are left
    left = select(pieces, shapes, density=0.3, budget=budget, protect=[earlier])
    assert select(there, shapes, density=0.3, budget=budget, protect=[earlier]).mask == left.mask


@pytest.mark.parametrize("budget", ["global", "per_tensor"])
def test_rows_outside_of_a_range_are_neither_chosen_nor_counted(budget: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, rows = {"a": (10, 8), "b": (6, 5)}, {"a": (7, 10)}
    scores = {name: torch.rand(shape, generator=generator).flatten() for name, shape in shapes.items()}
    scores["a"][:56] += 10  # the best scores lie outside
    earlier = Mask.from_dense({"a": torch.arange(80).view(10, 8) % 4 == 0})
    for protect in ([], [earlier]):
        chosen = select(
            lambda: ((name, 0, score) for name, score in scores.items()),
            shapes,
            density=0.5,
            budget=budget,
            rows=rows,
            protect=protect,
        )
        assert chosen.eligible == chosen.mask.eligible == 24 + 30
        assert chosen.num_active == 27
        positions = chosen.mask.indices("a")
        assert int(positions.min()) >= 56
        assert chosen.mask.restricted_rows == rows
        assert not protect or chosen.mask.overlap(earlier) == 0

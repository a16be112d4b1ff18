"""The same micro-batches give the same importance on 1, 2 and 4 ranks as on one process, and no weight moves."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.retention import Importance
from lota.retention.factors import ExactSums, SquareSums
from tests.zero import cases

MICRO_BATCHES = 8


def micro_batch(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ((x, flags, target),) = cases.micro_batches(number + 1, 1)
    return x, flags, target


def _on_ranks(masks, options):
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    accumulation = options.get("accumulation", 1)
    model = cases.make_model(options.get("dtype", torch.float32))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    mask = lota.Mask.from_dense(masks) if options.get("exact") else None
    with lota.importance_zero3(include=["blocks*"], mask=mask) as run:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=cases.default_optimizer(model),
            config=cases.config(accumulation, world, **options.get("config", {})),
        )
        for number in range(rank, MICRO_BATCHES, world):
            x, flags, target = micro_batch(number)
            logits = engine(x.to(next(iter(before.values())).dtype), flags)
            engine.backward(F.cross_entropy(logits.float(), target))
            engine.step()
        after = cases.gathered(engine.module)
        importance = run.importance({"data": "made up"})
        engine.destroy()
    unmoved = all(torch.equal(after[name], before[name]) for name in before)
    return {"importance": importance, "unmoved": unmoved}


def of_one_process(masks) -> Importance:
    """On one process, by torch.autograd alone."""
    model = cases.make_model()
    parameters = {n: p for n, p in model.named_parameters() if n.startswith("blocks")}
    sums = {name: SquareSums(tuple(p.shape), torch.device("cpu")) for name, p in parameters.items()}
    exact = ExactSums(lota.Mask.from_dense(masks), {})
    for number in range(MICRO_BATCHES):
        x, flags, target = micro_batch(number)
        loss = F.cross_entropy(model(x, flags), target)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].add(gradient)
                exact.add(name, gradient)
    return Importance.of_sums({name: tuple(p.shape) for name, p in parameters.items()}, sums, exact)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (2, {"exact": True}),
        (4, {"exact": True}),
        (2, {"accumulation": 2}),
        (2, {"config": {"zero": {"stage3_param_persistence_threshold": 100_000}}}),
    ],
)
def test_equals_one_process(ranks, world, options):
    masks = cases.make_masks()
    expected = of_one_process(masks)
    results = ranks(world).run(_on_ranks, masks, options)
    mask = lota.Mask.from_dense(masks)
    for result in results:
        found: Importance = result["importance"]
        assert result["unmoved"]
        assert found.digest == results[0]["importance"].digest
        assert found.facts["micro_batches"] == MICRO_BATCHES and found.facts["data"] == "made up"
        assert set(found.names) <= set(expected.names) and set(mask.names) <= set(found.names)
        # normalised over the tensors that take part, which are the matrices of the blocks
        numel = {name: cases.make_model().get_parameter(name).numel() for name in found.names}
        every = {name: torch.arange(count, dtype=torch.int64) for name, count in numel.items()}
        mean = sum(float(expected.at(name, every[name]).double().sum()) for name in numel) / sum(numel.values())
        for name, positions in every.items():
            # fp32 gradients of another summation order, squared
            torch.testing.assert_close(
                found.at(name, positions), expected.at(name, positions) / mean, rtol=1e-4, atol=1e-6, msg=name
            )
        for name in mask.names if options.get("exact") else ():
            torch.testing.assert_close(
                found.at_active(mask, name), expected.at_active(mask, name) / mean, rtol=2**-6, atol=1e-6
            )  # two roundings to bf16


def test_the_sums_do_not_depend_on_the_ranks_that_made_them(ranks):
    masks = cases.make_masks()
    one, two, four = (ranks(world).run(_on_ranks, masks, {})[0]["importance"] for world in (1, 2, 4))
    for name in one.names:
        positions = torch.arange(cases.make_model().get_parameter(name).numel(), dtype=torch.int64)
        for other in (two, four):
            torch.testing.assert_close(one.at(name, positions), other.at(name, positions), rtol=1e-5, atol=0)


def _refused(_):
    import deepspeed

    model = cases.make_model()
    with lota.importance_zero3(include=["blocks*"]) as run:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=cases.default_optimizer(model),
            config=cases.config(1, torch.distributed.get_world_size()),
        )
        with pytest.raises(ValueError, match="no micro-batch ended"):
            run.importance()
        with pytest.raises(ValueError, match="save_strategy='no'"):
            engine.save_checkpoint("/tmp/never")
        engine.destroy()
    return True


def test_without_a_step_or_with_a_checkpoint_it_says_what_to_do(ranks):
    assert all(ranks(2).run(_refused, None))

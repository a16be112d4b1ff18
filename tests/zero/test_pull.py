"""A pulled run equals a dense float64 replay on 1, 2 and 4 ranks, and resumes bit for bit; its length must be known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.retention import Importance
from tests.zero import cases

STEPS, PULL = 8, 20.0


def make_importance(seed: int = 5) -> Importance:
    """Of the matrices of the blocks; nothing in common with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: tuple(p.shape) for n, p in cases.make_model().named_parameters() if n in cases.make_masks()}
    rows = {name: torch.rand(shape[0], generator=generator).exp() for name, shape in shapes.items()}
    columns = {name: torch.rand(shape[1], generator=generator) for name, shape in shapes.items()}
    for name in shapes:  # sums of the same matrix
        columns[name] *= rows[name].sum() / columns[name].sum()
    return Importance(shapes, rows, columns)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def _run(masks, steps: int, stop: int, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """`steps` steps; with `stop`, in two engines with a checkpoint after that many."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    options = dict(options)
    make = options.pop("make_optimizer", cases.default_optimizer)
    dtype = options.pop("dtype", torch.float32)
    overrides = options.pop("config", {})
    rows = slice(rank * cases.ROWS // world, (rank + 1) * cases.ROWS // world)
    for first, last in ((0, stop), (stop, steps)) if stop else ((0, steps),):
        model = cases.make_model(dtype)
        with lota.sparse_zero3(lota.Mask.from_dense(masks), num_steps=steps, **options) as run:
            optimizer = make(model)
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                lr_scheduler=schedule(optimizer),
                config=cases.config(1, world, **overrides),
            )
            if first:
                engine.load_checkpoint(folder)
            for step in range(first + 1, last + 1):
                ((x, flags, target),) = cases.micro_batches(step, 1)
                logits = engine(x[rows].to(dtype), flags[rows])
                engine.backward(F.cross_entropy(logits.float(), target[rows]))
                engine.step()
            if last < steps:
                engine.save_checkpoint(folder)
            report = run.report()
            after = cases.gathered(engine.module)
            vectors = {vector.key: vector.get().clone() for vector in run.core.vectors()}
            engine.destroy()
    return {"after": after, "report": report, "vectors": vectors}


def replay(masks, importance: Importance, pull: float) -> dict[str, torch.Tensor]:
    """Dense, float64, one process: an AdamW step, then the proximal step."""
    model = cases.make_model().double()
    parameters = {name: param for name, param in model.named_parameters() if name in masks}
    old = {name: param.detach().clone() for name, param in parameters.items()}
    rates = [cases.SETTINGS["lr"] / (1 + step) for step in range(STEPS)]
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    b1, b2 = cases.SETTINGS["betas"]
    for step in range(1, STEPS + 1):
        ((x, flags, target),) = cases.micro_batches(step, 1)
        loss = F.cross_entropy(model(x.double(), flags), target)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients = {}
        for (name, param), gradient in zip(parameters.items(), found, strict=True):
            gradients[name] = (torch.zeros_like(param) if gradient is None else gradient) * masks[name]
        norm = float(torch.sqrt(sum((g**2).sum() for g in gradients.values())))
        lr, clip = rates[step - 1], min(1.0, cases.CLIP / (norm + 1e-6))
        with torch.no_grad():
            for name, param in parameters.items():
                m, v = moments[name]
                g = gradients[name] * clip
                m.mul_(b1).add_(g * (1 - b1))
                v.mul_(b2).add_(g * g * (1 - b2))
                new = param - param * lr * cases.SETTINGS["weight_decay"]
                new = new - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + cases.SETTINGS["eps"])
                strength = importance.at(name, torch.arange(param.numel())).view(param.shape)
                strength = strength.bfloat16().double() * lr * pull / sum(rates)
                new = old[name] + (new - old[name]) / (1 + strength)
                param.copy_(torch.where(masks[name], new, param))
    return {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (2, {}),
        (2, {"gradient_reduction": "dense"}),
        (4, {"shard_group_size": 2}),
        (4, {"shard_group_size": 1, "reduce_every": "step"}),
        (2, {"config": {"zero": {"offload_param": {"device": "cpu"}}}}),
        (2, {"config": {"zero": {"sub_group_size": 1000}}}),
    ],
)
def test_equals_the_dense_replay(ranks, world, options):
    masks, importance = cases.make_masks(), make_importance()
    expected, without = replay(masks, importance, PULL), replay(masks, importance, 0.0)
    results = ranks(world).run(_run, masks, STEPS, 0, "", {"retain": [importance], "pull": PULL, **options})
    for result in results:
        for name, weight in expected.items():
            # fp32 sums in another order than the replay's float64 ones
            assert (result["after"][name].double() - weight).abs().max() <= 1e-5 * weight.abs().max(), name
        report = result["report"]["pull"]
        assert report["asked"] == PULL and report["reached"] == pytest.approx([PULL], rel=1e-6)
        assert result["report"]["bytes_held"]["importance"] > 0 < result["report"]["bytes_held"]["old_values"]
    start = {name: param.detach().double() for name, param in cases.make_model().named_parameters()}
    moved, freely = (sum(float((made[n] - start[n]).norm()) for n in masks) for made in (expected, without))
    assert moved < 0.9 * freely  # the replay itself is pulled


def test_frozen_entries_keep_their_bits_and_the_ticket_is_of_the_base(ranks):
    masks = cases.make_masks()
    options = {"retain": [make_importance()], "pull": PULL, "dtype": torch.bfloat16}
    options["config"] = {"bf16": {"enabled": True}}
    before = cases.make_model(torch.bfloat16)
    for result in ranks(2).run(_run, masks, STEPS, 0, "", options):
        for name, after in result["after"].items():
            frozen = ~masks.get(name, torch.zeros_like(after, dtype=torch.bool))
            assert torch.equal(after[frozen], before.get_parameter(name)[frozen]), name


def test_several_tasks_pull_as_their_sum(ranks):
    masks, one, two = cases.make_masks(), make_importance(5), make_importance(6)
    both = ranks(1).run(_run, masks, STEPS, 0, "", {"retain": [one, two], "pull": PULL})[0]
    total = {name: one._rows[name] + two._rows[name] for name in one.names}  # not factored: compare with one of them
    assert total.keys() == both["after"].keys() & masks.keys()
    alone = ranks(1).run(_run, masks, STEPS, 0, "", {"retain": [one], "pull": PULL})[0]
    start = cases.make_model()

    def moved(result):
        return sum(float((result["after"][n] - start.get_parameter(n)).norm()) for n in masks)

    assert moved(both) < moved(alone)


def _rmsprop(model):
    return torch.optim.RMSprop(model.parameters(), lr=1e-3)


def _nadam(model):
    return torch.optim.NAdam(model.parameters(), lr=3e-3)


@pytest.mark.parametrize("make", [cases.default_optimizer, _rmsprop, _nadam])
@pytest.mark.parametrize("world", [1, 2])
def test_resumed_equals_uninterrupted(ranks, tmp_path, make, world):
    masks, options = cases.make_masks(), {"retain": [make_importance()], "pull": PULL, "make_optimizer": make}
    straight = ranks(world).run(_run, masks, STEPS, 0, "", options)
    resumed = ranks(world).run(_run, masks, STEPS, 3, str(tmp_path), options)
    for one, other in zip(straight, resumed, strict=True):
        assert one["vectors"].keys() == other["vectors"].keys()
        assert all(torch.equal(value, other["vectors"][key]) for key, value in one["vectors"].items())
        assert all(torch.equal(weight, other["after"][name]) for name, weight in one["after"].items())
        assert other["report"]["pull"]["reached"] == pytest.approx([PULL], rel=1e-6)


def test_another_pull_is_refused_on_resuming(ranks, tmp_path):
    masks = cases.make_masks()
    ranks(1).run(_stopped, masks, str(tmp_path), make_importance(), PULL)
    with pytest.raises(Exception, match="pull"):
        ranks(1).run(_resumed, masks, str(tmp_path), make_importance(), PULL + 1)


def _stopped(masks, folder: str, importance: Importance, pull: float) -> None:
    _one_engine(masks, importance, pull, lambda engine: engine.save_checkpoint(folder))


def _resumed(masks, folder: str, importance: Importance, pull: float) -> None:
    _one_engine(masks, importance, pull, lambda engine: engine.load_checkpoint(folder))


def _one_engine(masks, importance, pull, use) -> None:
    import deepspeed

    model = cases.make_model()
    with lota.sparse_zero3(lota.Mask.from_dense(masks), retain=[importance], pull=pull, num_steps=4):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 1)
        )
        try:
            use(engine)
        finally:
            engine.destroy()


def _no_schedule(masks, importance) -> str:
    import deepspeed

    model = cases.make_model()
    with lota.sparse_zero3(lota.Mask.from_dense(masks), retain=[importance], pull=PULL):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 1)
        )
        ((x, flags, target),) = cases.micro_batches(1, 1)
        engine.backward(F.cross_entropy(engine(x, flags), target))
        try:
            engine.step()
        except ValueError as error:
            return str(error)
        finally:
            engine.destroy()
    return ""


def test_a_run_of_unknown_length_is_refused_at_its_first_step(ranks):
    assert "num_steps" in ranks(1).run(_no_schedule, cases.make_masks(), make_importance())[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pull": 10}, "pull needs retain"),
        ({"retain": ["x"]}, "retain needs pull"),
        ({"retain": ["x"], "pull": -1}, "positive number"),
        ({"retain": ["x"], "pull": float("nan")}, "positive number"),
        ({"retain": ["nowhere"], "pull": 10}, "found none"),
        ({"retain": [3], "pull": 10}, "Importance or paths"),
    ],
)
def test_bad_options_are_refused_before_anything(options, message):
    mask = lota.Mask.from_dense(cases.make_masks())
    with pytest.raises(ValueError, match=message), lota.sparse_zero3(mask, **options):
        pass


def test_paths_of_importance_files_will_do(ranks, tmp_path: Path):
    masks, importance = cases.make_masks(), make_importance()
    importance.save(tmp_path / "task.safetensors")
    by_path, by_object = (
        ranks(1).run(_run, masks, STEPS, 0, "", {"retain": [item], "pull": PULL})[0]
        for item in (str(tmp_path / "task.safetensors"), importance)
    )
    assert all(torch.equal(weight, by_object["after"][name]) for name, weight in by_path["after"].items())

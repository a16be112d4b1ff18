"""Scores equal a brute-force computation, whatever the ranks and micro batches; memory is what is promised."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from tests.zero import cases

STEPS = 3


def _batches(step: int, accumulation: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The same global batch of two times eight rows, as one micro batch or as two."""
    x, flags, target = (torch.cat(parts) for parts in zip(*cases.micro_batches(step, 2), strict=True))
    if accumulation == 1:
        return [(x, flags, target)]
    return [(x[half], flags[half], target[half]) for half in (slice(0, cases.ROWS), slice(cases.ROWS, None))]


def _calibrate(score: str, accumulation: int, dtype: str = "float32") -> dict[str, Any]:
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    kind = getattr(torch, dtype)
    cases.allow_fp16_on_cpu()
    model = cases.make_model(kind)
    rows = 2 * cases.ROWS // accumulation // world
    overrides: dict[str, Any] = {"train_micro_batch_size_per_gpu": rows, "gradient_clipping": 0.0}
    if dtype == "bfloat16":
        overrides["bf16"] = {"enabled": True}
    if dtype == "float16":
        overrides["fp16"] = {"enabled": True, "initial_scale_power": 4}
    with lota.calibration_zero3(score=score, density=0.2, include=["*blocks*"]) as run:
        config = cases.config(accumulation, world, **overrides)
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        for step in range(1, STEPS + 1):
            for x, flags, target in _batches(step, accumulation):
                mine = slice(rank * rows, (rank + 1) * rows)
                if score == "task_vector":
                    # Dense training is DeepSpeed's own, which hangs where ranks use different weights.
                    flags = torch.ones_like(flags)
                logits = engine(x[mine].to(kind), flags[mine])
                engine.backward(F.cross_entropy(logits.float(), target[mine]))
                engine.step()
    scores = {name: (start, values.clone()) for name, start, values in run._run.scores()}
    weights = cases.gathered(engine.module)
    mask = run.mask()
    engine.destroy()
    return {"scores": scores, "weights": weights, "mask": mask, "report": run.report()}


def _whole(results: list[dict[str, Any]], name: str) -> torch.Tensor:
    return torch.cat([result["scores"][name][1].float() for result in results])


def _expected(score: str) -> dict[str, torch.Tensor]:
    """Brute force in float64 on one process."""
    model = cases.make_model().double()
    parameters = {name: p for name, p in model.named_parameters() if "blocks" in name and p.dim() == 2}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for step in range(1, STEPS + 1):
        ((x, flags, target),) = _batches(step, 1)
        gradients = torch.autograd.grad(F.cross_entropy(model(x.double(), flags), target), list(parameters.values()))
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient**2 / STEPS if score == "fisher" else gradient.abs() / STEPS
    if score == "snip":
        return {name: value * parameters[name].detach().abs() for name, value in total.items()}
    if score == "magnitude":
        return {name: p.detach().abs() for name, p in parameters.items()}
    return total


@pytest.mark.parametrize("score", ["gradient", "fisher", "snip", "magnitude"])
def test_scores_equal_brute_force_on_any_ranks_and_micro_batches(ranks, score):
    expected = _expected(score)
    for world, accumulation in ((1, 1), (1, 2), (2, 1), (4, 2)):
        results = ranks(world).run(_calibrate, score, accumulation)
        for name, value in expected.items():
            # fp32 gradients against float64 ones
            assert torch.allclose(_whole(results, name).double(), value.flatten(), rtol=1e-4, atol=1e-8), name
            assert torch.equal(results[0]["weights"][name], cases.make_model().get_parameter(name)), "no step was taken"
        assert results[0]["mask"].num_active == round(0.2 * results[0]["mask"].eligible)
        assert all(result["mask"] == results[0]["mask"] for result in results)


def test_task_vector_is_master_minus_base(ranks):
    base = cases.make_model()
    for dtype in ("float32", "bfloat16"):
        results = ranks(2).run(_calibrate, "task_vector", 2, dtype)
        for name in results[0]["mask"].names:
            vector = _whole(results, name)
            moved = (
                results[0]["weights"][name].float().flatten()
                - base.get_parameter(name).to(getattr(torch, dtype)).float().flatten()
            )
            if dtype == "float32":
                assert torch.equal(vector, moved)
            else:
                assert (vector != 0).float().mean() > 0.95, "fp32 masters move where bf16 weights do not"
                # half a bf16 unit of weights below 2
                assert torch.allclose(vector, moved, atol=4e-3, rtol=0)
        frozen = [name for name in results[0]["weights"] if name not in results[0]["mask"].names]
        assert frozen
        for name in frozen:
            assert torch.equal(results[0]["weights"][name], base.get_parameter(name).to(getattr(torch, dtype)))


def test_random_scores_do_not_depend_on_ranks(ranks):
    masks = [ranks(world).run(_calibrate, "random", 1)[0]["mask"] for world in (1, 2, 4)]
    assert masks[0] == masks[1] == masks[2]
    counts = [masks[0].active(name) / masks[0].numel(name) for name in masks[0].names]
    assert max(abs(count - 0.2) for count in counts) < 0.06, "spread over all tensors"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gradients_choose_almost_the_same_entries(ranks, dtype):
    fp32, low = (ranks(2).run(_calibrate, "gradient", 1, kind)[0]["mask"] for kind in ("float32", dtype))
    assert fp32.overlap(low) > 0.9 * fp32.num_active


def _live_bytes(accumulation: int) -> dict[str, float]:
    """Two global batches under a dispatch mode, on a model of large weights and tiny activations."""
    import deepspeed

    from tests.counting import LiveTensors
    from tests.zero.test_nothing_dense import Wide

    live = LiveTensors()
    peaks = {"step": 0}
    with live, lota.calibration_zero3(score="gradient", density=0.1) as run:
        torch.manual_seed(0)
        model = Wide().to(torch.bfloat16)
        config = wide_config(accumulation)
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
        for step in range(2):
            for micro in range(accumulation):
                x = torch.randn(1, 4, generator=torch.Generator().manual_seed(10 * step + micro)).to(torch.bfloat16)
                engine.backward(engine(x).float().square().mean())
                peaks["step"] = max(peaks["step"], live.nbytes())
                engine.step()
                peaks["step"] = max(peaks["step"], live.nbytes())
        numel = sum(p.ds_numel for p in engine.module.parameters())
        held = run.report()["bytes_held"]
    run.mask()
    engine.destroy()
    return {"per_parameter": peaks["step"] * torch.distributed.get_world_size() / numel, "numel": numel, "held": held}


def wide_config(accumulation: int) -> dict[str, Any]:
    from tests.zero import test_nothing_dense

    return test_nothing_dense._config(2) | {"gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize(("accumulation", "promised"), [(1, 6), (2, 10)])
def test_gradient_scores_hold_six_bytes_a_parameter(ranks, accumulation, promised):
    from tests.zero.test_nothing_dense import BUCKET, FINGERPRINT_TABLE

    for result in ranks(2).run(_live_bytes, accumulation):
        # beside the promise: the fingerprints' constant table, a bucket of one layer (each is larger than BUCKET), and
        # the last layer's gathered weights
        one_layer = 6 * 384 * 384
        allowed = 2 * (FINGERPRINT_TABLE + one_layer + 4 * BUCKET) / result["numel"]
        assert promised * 0.95 < result["per_parameter"] <= promised * 1.01 + allowed
        assert result["held"]["scores"] == pytest.approx(4 * result["numel"] / 2, rel=0.01)


def _no_step(score: str) -> None:
    import deepspeed

    model = cases.make_model()
    with lota.calibration_zero3(score=score, density=0.2, include=["*blocks*"]) as run:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=cases.default_optimizer(model), config=cases.config(1, 2)
        )
    try:
        run.mask()
    finally:
        engine.destroy()


@pytest.mark.parametrize(("score", "message"), [("gradient", "at least one global batch"), ("task_vector", "zero")])
def test_nothing_trained_is_an_error(ranks, score, message):
    for outcome in ranks(2).outcomes(_no_step, score):
        assert outcome.error_type == "ValueError" and message in outcome.error, outcome.error

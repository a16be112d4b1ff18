"""Too many skipped steps in a row end the run on every rank, with the name of a tensor whose gradient is not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import lota
from lota.zero.compact.skipped_steps import SkippedSteps
from tests.zero import cases

SPOILT = "blocks.0.up.weight"
STOPPED = f"expected finite gradients, got inf or nan, and {{}} steps in a row were skipped for that; first in {SPOILT}"
FP16 = {"enabled": True, "initial_scale_power": 3, "loss_scale_window": 1000, "hysteresis": 1, "min_loss_scale": 2}


def _train(
    block: Any, dtype: torch.dtype, bad_steps: range, micro_steps: int, spoils_all: bool, **overrides: Any
) -> Any:
    """Train 8 steps in `block`; in bad steps rank 1's gradient of one tensor, or its loss, is not finite. Returns the
    error, the steps made, and whether each step was applied."""
    import deepspeed

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cases.allow_fp16_on_cpu()
    model, applied = cases.make_model(dtype), []
    is_bad = [False]
    if not spoils_all:
        target = model.get_parameter(SPOILT)
        target.register_hook(lambda g: g * float("nan") if is_bad[0] and rank == 1 else g)
    with block as run:
        config = cases.config(micro_steps, world, **overrides)
        engine, *_ = deepspeed.initialize(model=model, optimizer=cases.default_optimizer(model), config=config)
        rows = slice(rank * cases.ROWS // world // micro_steps, (rank + 1) * cases.ROWS // world // micro_steps)
        error = None
        try:
            for step in range(1, 9):
                is_bad[0] = step in bad_steps
                for x, flags, target in cases.micro_batches(step, micro_steps):
                    loss = F.cross_entropy(engine(x[rows].to(dtype), flags[rows]).float(), target[rows])
                    is_inf = spoils_all and is_bad[0] and rank == 1
                    engine.backward(loss * float("inf") if is_inf else loss)
                    engine.step()
                applied.append(engine.was_step_applied())
        except FloatingPointError as caught:
            error = str(caught)
        report = run.report()
        engine.destroy()
    return {"error": error, "applied": applied, "skipped": report["skipped_steps"]}


def _sparse(dtype, bad_steps, limit, micro_steps=1, spoils_all=False, how=None, **overrides):
    mask = lota.Mask.from_dense(cases.make_masks())
    block = lota.sparse_zero3(mask, max_skipped_steps=limit, **(how or {}))
    return _train(block, dtype, bad_steps, micro_steps, spoils_all, **overrides)


def _calibrate(score, bad_steps, limit, micro_steps):
    block = lota.calibration_zero3(score=score, include=["*up*", "*down*"], max_skipped_steps=limit)
    return _train(block, torch.float32, bad_steps, micro_steps, False)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"bf16": {"enabled": True}, "how": {"shard_group_size": 1}}),
        (torch.float32, {"micro_steps": 2, "how": {"reduce_every": "step"}}),
        (torch.float32, {"how": {"gradient_reduction": "dense"}}),
    ],
)
def test_too_many_in_a_row_end_the_run_with_the_tensors_name(ranks, dtype, options):
    for result in ranks(2).run(_with, "sparse", (dtype, range(3, 9), 3), options):
        assert f"step 5: {STOPPED.format(3)}" in result["error"]
        assert result["applied"] == [True, True, False, False] and result["skipped"] == 3


def test_fewer_in_a_row_are_counted_and_a_good_step_begins_anew(ranks):
    for result in ranks(2).run(_with, "sparse", (torch.float32, [2, 3, 5, 6], 3), {"spoils_all": True}):
        assert result["error"] is None and result["skipped"] == 4
        assert result["applied"] == [True, False, False, True, False, False, True, True]


def test_fp16_counts_at_the_lowest_loss_scale_only(ranks):
    """From scale 8 it takes two skipped steps down to the lowest, 2; then two more are one too many."""
    for result in ranks(2).run(_with, "sparse", (torch.float16, range(1, 9), 2), {"fp16": FP16}):
        assert f"step 4: {STOPPED.format(2)}" in result["error"]


@pytest.mark.parametrize(("score", "micro_steps"), [("task_vector", 1), ("gradient", 2)])
def test_calibration_skips_and_stops_too(ranks, score, micro_steps):
    for result in ranks(2).run(_with, "calibrate", (score, range(3, 9), 3, micro_steps), {}):
        assert f"step 5: {STOPPED.format(3)}" in result["error"]
        assert result["applied"] == [True, True, False, False] and result["skipped"] == 3


def test_a_gradient_that_went_into_the_score_at_once_ends_calibration(ranks):
    for result in ranks(2).run(_with, "calibrate", ("gradient", range(3, 9), 3, 1), {}):
        assert f"step 3: expected finite gradients, got inf or nan; first in {SPOILT}" in result["error"]
        assert "gradient_accumulation_steps of 2 or more" in result["error"]


def _with(what, args, options):
    return {"sparse": _sparse, "calibrate": _calibrate}[what](*args, **options)


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "3"])
def test_the_limit_is_checked(value):
    mask = lota.Mask.from_dense({"weight": torch.ones(2, 2, dtype=torch.bool)})
    with (
        pytest.raises(ValueError, match="max_skipped_steps must be an integer of at least 1"),
        lota.sparse_zero3(mask, max_skipped_steps=value),
    ):
        pass


def test_no_name_is_looked_for_before_the_last_chance():
    skipped = SkippedSteps(3)
    skipped.in_a_row = 1
    skipped.before_step(lambda: pytest.fail("looked"))

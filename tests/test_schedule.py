"""The sum of learning rates that is foretold is the sum that a run really sets, and asking changes nothing."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from deepspeed.runtime import lr_schedules
from torch.optim import lr_scheduler
from transformers import SchedulerType, get_scheduler

from lota.schedule import find_scheduler, total_learning_rate

STEPS = 20


def _optimizer() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in (0.1, 0.02)]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def _really(optimizer: torch.optim.Optimizer, scheduler) -> list[float]:
    totals = [0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(STEPS):
            totals = [total + float(group["lr"]) for total, group in zip(totals, optimizer.param_groups)]
            optimizer.step()
            scheduler.step()
    return totals


def _sequential(optimizer):
    first = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=5)
    second = lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 5)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[5])


TORCH = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=STEPS + 1),
    "sequential": _sequential,
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o)]
    ),
    "deepspeed": lambda o: lr_schedules.WarmupDecayLR(o, total_num_steps=STEPS, warmup_num_steps=4),
}


@pytest.mark.parametrize("kind", TORCH)
def test_is_what_the_run_sets(kind: str) -> None:
    optimizer = _optimizer()
    scheduler = TORCH[kind](optimizer)
    before = [dict(group, params=None) for group in optimizer.param_groups]
    foretold = total_learning_rate(optimizer, scheduler, STEPS)
    assert [dict(group, params=None) for group in optimizer.param_groups] == before
    assert foretold == pytest.approx(_really(optimizer, scheduler), rel=1e-12)


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_transformers_schedules_by_name(kind: str) -> None:
    optimizer = _optimizer()
    extra = {"cosine_with_min_lr": {"min_lr": 1e-3}, "cosine_warmup_with_min_lr": {"min_lr": 1e-3}}.get(kind, {})
    if kind == "warmup_stable_decay":
        extra = {"num_decay_steps": 5}
    scheduler = get_scheduler(
        kind, optimizer, num_warmup_steps=3, num_training_steps=STEPS, scheduler_specific_kwargs=extra
    )
    if "metrics" in scheduler.step.__code__.co_varnames:
        with pytest.raises(ValueError, match="depends on the step alone"):
            total_learning_rate(optimizer, scheduler, STEPS)
        return
    found = total_learning_rate(optimizer, num_steps=STEPS)  # found by itself
    assert found == pytest.approx(_really(optimizer, scheduler), rel=1e-12)


def test_transformers_schedules_know_their_length() -> None:
    optimizer = _optimizer()
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    assert total_learning_rate(optimizer) == total_learning_rate(optimizer, scheduler, STEPS)


def test_without_a_schedule_rates_are_constant_and_the_length_must_be_given() -> None:
    optimizer = _optimizer()
    gc.collect()
    assert total_learning_rate(optimizer, num_steps=STEPS) == pytest.approx([0.1 * STEPS, 0.02 * STEPS])
    with pytest.raises(ValueError, match="pass num_steps"):
        total_learning_rate(optimizer)
    with pytest.raises(ValueError, match="at least 1"):
        total_learning_rate(optimizer, num_steps=0)


def test_the_outermost_of_this_optimizer_is_found() -> None:
    optimizer, other = _optimizer(), _optimizer()
    assert find_scheduler(optimizer) is None
    wanted, unrelated = _sequential(optimizer), TORCH["step"](other)
    assert find_scheduler(optimizer) is wanted and find_scheduler(other) is unrelated

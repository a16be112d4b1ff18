"""The sum of the learning rates that a schedule will set over a whole run, known before the first step."""

from __future__ import annotations

import copy
import gc
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


def total_learning_rate(optimizer: Any, scheduler: Any = None, num_steps: int | None = None) -> list[float]:
    """For every parameter group, the sum of its learning rates over all steps of the run.

    Call it before the first step: a copy of the scheduler is run to the end beside the optimizer, which stays as it is.
    optimizer: torch's, or a wrapper with its `param_groups`. scheduler: torch's, or DeepSpeed's; None finds the one of
    this process that sets the optimizer's learning rates; where there is none they are constant. num_steps: how many
    steps there will be; None takes what transformers' schedules know. ValueError where nobody knows it, and for a
    schedule that depends on more than the step.
    """
    scheduler = find_scheduler(optimizer) if scheduler is None else _unwrapped(scheduler)
    if scheduler is not None and "metrics" in inspect.signature(scheduler.step).parameters:
        raise ValueError(
            f"the pull needs to know the learning rates of the whole run, and {type(scheduler).__name__} decides them "
            "on the way: use a schedule that depends on the step alone"
        )
    if num_steps is None:
        num_steps = next(_announced(scheduler), None)
    if num_steps is None:
        raise ValueError(
            "the pull needs to know how long the run is, and its schedule does not say: pass num_steps, the number of "
            "optimizer steps"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    groups = [{**group, "params": [torch.zeros(1, dtype=torch.float32)]} for group in optimizer.param_groups]
    if scheduler is None:
        return [float(group["lr"]) * num_steps for group in groups]
    stand_in = torch.optim.SGD(groups, lr=0.0)  # every group brings a learning rate of its own
    stand_in.defaults = dict(getattr(optimizer, "defaults", {}))
    simulated = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})
    totals = [0.0] * len(groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing stepped between two steps of the schedule
        for _ in range(num_steps):
            for number, group in enumerate(stand_in.param_groups):
                totals[number] += float(group["lr"])
            simulated.step()
    return totals


def find_scheduler(optimizer: Any) -> LRScheduler | None:
    """torch's scheduler of this process that sets the optimizer's learning rates, the outermost of those that hold
    others; None where there is none."""
    found = [
        item
        for item in gc.get_objects()
        if issubclass(type(item), LRScheduler)
        and getattr(getattr(item, "optimizer", None), "param_groups", None) is optimizer.param_groups
    ]
    held = {id(inner) for item in found for inner in getattr(item, "_schedulers", ())}
    outermost = [item for item in found if id(item) not in held]
    return outermost[-1] if outermost else None


def _unwrapped(scheduler: Any) -> Any:
    """accelerate's wrapper holds the scheduler itself."""
    while not hasattr(scheduler, "optimizer") and hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    return scheduler


def _announced(scheduler: Any) -> Iterator[int]:
    """How many steps the schedule was made for, as transformers' schedules keep it."""
    for function in getattr(scheduler, "lr_lambdas", ()):
        steps = getattr(function, "keywords", {}).get("num_training_steps")
        if isinstance(steps, int) and steps > 0:
            yield steps

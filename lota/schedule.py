"""The sum of the learning rates that a run will use, found by stepping a copy of its scheduler.

What is spread over a whole run in proportion to the learning rate (the pull of `lota.optim`) has to know that sum at
the first step, so the scheduler is copied, the copy gets an optimizer of its own, and is stepped to the end of the run.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import sys
import warnings
from bisect import bisect_right
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

_COUNTERS = {"last_epoch": 0, "last_batch_iteration": -1}
"""Where torch's schedulers (and those that look like them) and DeepSpeed's count their steps, and what stands there at
the beginning."""


def total_learning_rate(optimizer: Any, scheduler: Any = None, num_steps: int | None = None) -> list[float]:
    """For each parameter group the sum of the learning rates of the run's steps, from step 0 on.

    Neither optimizer nor scheduler is changed. optimizer: anything that has `param_groups` as torch's have. scheduler:
    of torch, transformers or DeepSpeed, or accelerate's wrapper around one; None looks for the one in this process
    that sets the learning rates of these groups, among all objects that the garbage collector knows, and takes them as
    constant where there is none. num_steps: the optimizer steps of the run; None takes them from the scheduler, where
    that states them (transformers' schedules that end, OneCycleLR, DeepSpeed's WarmupDecayLR and WarmupCosineLR).

    ValueError where the number of steps is not known, where several schedulers set these learning rates, where the
    scheduler depends on more than the step (ReduceLROnPlateau), and where it has been stepped already and cannot be put
    back to its beginning (torch's own and DeepSpeed's can, save for a SequentialLR or ChainedScheduler inside another).
    """
    check_num_steps(num_steps)
    scheduler, wrapper = _find(optimizer) if scheduler is None else _unwrapped(scheduler)
    if scheduler is not None:
        _check(scheduler, optimizer)
    stride = 1 if wrapper is None else _stride(wrapper)
    if num_steps is None:
        num_steps = -(-_stated_steps(scheduler) // stride)
    stand_in = _stand_in(optimizer)
    if scheduler is None:
        return [float(group["lr"]) * num_steps for group in stand_in.param_groups]
    totals = [0.0] * len(stand_in.param_groups)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copy is stepped without an optimizer's steps in between
        copied = _copied(scheduler, stand_in)
        if not _is_at_beginning(copied):
            _put_back(copied, stand_in)
        for step in range(num_steps):
            for _ in range(stride if step else 0):
                if wrapper is None or not _is_over(copied):
                    copied.step()
            for number, group in enumerate(stand_in.param_groups):
                totals[number] += float(group["lr"])
    return totals


def check_num_steps(num_steps: Any) -> None:
    """ValueError for anything but None or a positive integer."""
    if num_steps is not None and (type(num_steps) is not int or num_steps < 1):
        raise ValueError(f"num_steps must be a positive integer, the steps of the whole run, got {num_steps!r}")


def _find(optimizer: Any) -> tuple[Any, Any]:
    """The scheduler of the optimizer's groups and accelerate's wrapper around it, or None for either.

    A scheduler that another one holds (SequentialLR, ChainedScheduler) counts as a part of that one.
    """
    gc.collect()  # of those that nobody holds any more, but in a circle
    found, wrappers = _alive(optimizer)
    if len(found) > 1:
        names = ", ".join(sorted(type(scheduler).__name__ for scheduler in found))
        raise ValueError(
            f"{len(found)} schedulers set the learning rates of this optimizer ({names}), and which of them steps is "
            "not known: delete those that are not used, and put those that step together into one ChainedScheduler"
        )
    if not found:
        return None, None
    return found[0], next((wrapper for wrapper in wrappers if wrapper.scheduler is found[0]), None)


def _alive(optimizer: Any) -> tuple[list[Any], list[Any]]:
    """(schedulers of the optimizer's groups that no other of them holds, all of accelerate's wrappers) alive here."""
    kinds: dict[type, str] = {}
    schedulers, wrappers = [], []
    for thing in gc.get_objects():
        kind = type(thing)
        if kind not in kinds:
            kinds[kind] = _kind(kind)
        if kinds[kind] == "scheduler" and _sets_rates_of(thing, optimizer):
            schedulers.append(thing)
        elif kinds[kind] == "wrapper":
            wrappers.append(thing)
    held = {id(inner) for one in schedulers for inner in _held(one) if inner is not one}
    return [one for one in schedulers if id(one) not in held] or schedulers, wrappers


def _kind(kind: type) -> str:
    """What an object of a class is; looks at the class alone, because attributes of strangers may be computed."""
    members = {name for base in kind.__mro__ for name in vars(base)}
    if "step" not in members:
        return ""
    if any(base.__name__ == "AcceleratedScheduler" for base in kind.__mro__):
        return "wrapper"
    return "scheduler" if issubclass(kind, LRScheduler) or "get_last_lr" in members else ""


def _sets_rates_of(scheduler: Any, optimizer: Any) -> bool:
    own = getattr(scheduler, "__dict__", {}).get("optimizer")
    return own is not None and (own is optimizer or getattr(own, "param_groups", None) is optimizer.param_groups)


def _held(scheduler: Any) -> Iterator[Any]:
    for value in vars(scheduler).values():
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _unwrapped(scheduler: Any) -> tuple[Any, Any]:
    """The scheduler inside accelerate's wrapper, and the wrapper; or the scheduler itself, and None."""
    return (scheduler.scheduler, scheduler) if _kind(type(scheduler)) == "wrapper" else (scheduler, None)


def _stride(wrapper: Any) -> int:
    """How often accelerate's wrapper steps its scheduler at a step of the optimizer."""
    is_plain = type(wrapper).__name__ != "AcceleratedScheduler"  # under DeepSpeed the engine steps it
    if is_plain or wrapper.split_batches or not wrapper.step_with_optimizer:
        return 1
    return int(sys.modules["accelerate.state"].AcceleratorState().num_processes)


def _is_over(scheduler: Any) -> bool:
    """Whether accelerate's wrapper steps a OneCycleLR no more, which would raise."""
    return hasattr(scheduler, "total_steps") and scheduler._step_count > scheduler.total_steps


def _check(scheduler: Any, optimizer: Any) -> None:
    """ValueError where stepping alone does not tell the learning rates."""
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None)
    needed = [
        parameter.name
        for parameter in (inspect.signature(step).parameters.values() if callable(step) else ())
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        raise ValueError(
            f"the learning rates of {name} depend on {', '.join(needed)}, so their sum over the run is not known "
            "beforehand: use a scheduler that depends on the step alone"
        )
    leaves = list(_leaves(scheduler))
    if not callable(step) or not all(hasattr(leaf, "optimizer") and _has_counter(leaf) for leaf in leaves):
        raise ValueError(
            f"{name} is not a scheduler of a known kind: it needs step(), .optimizer, and .last_epoch as torch's have "
            "it or .last_batch_iteration as DeepSpeed's do"
        )
    num_groups, expected = len(scheduler.optimizer.param_groups), len(optimizer.param_groups)
    if num_groups != expected:
        raise ValueError(
            f"{name} sets the learning rates of {num_groups} parameter groups, the optimizer has {expected}: pass the "
            "scheduler that belongs to the optimizer"
        )


def _leaves(scheduler: Any) -> Iterator[Any]:
    """The schedulers that set learning rates themselves, inside those that only step others."""
    inner = getattr(scheduler, "_schedulers", None)
    if inner is None:
        yield scheduler
    else:
        for one in inner:
            yield from _leaves(one)


def _has_counter(scheduler: Any) -> bool:
    return any(hasattr(scheduler, name) for name in _COUNTERS)


def _stated_steps(scheduler: Any) -> int:
    """The steps of the run as the scheduler counts them; ValueError where it does not state them."""
    stated: set[Any] = {getattr(scheduler, name, None) for name in ("total_steps", "total_num_steps")}
    for schedule in getattr(scheduler, "lr_lambdas", ()):
        keywords = schedule.keywords if isinstance(schedule, functools.partial) else {}
        parts: list[Any] = [keywords.get(f"num_{part}_steps") for part in ("warmup", "stable", "decay")]
        stated |= {keywords.get("num_training_steps"), None if None in parts else sum(parts)}
    stated.discard(None)
    if len(stated) != 1:
        what = "there is no scheduler" if scheduler is None else f"{type(scheduler).__name__} does not state it"
        raise ValueError(
            f"the sum of the run's learning rates needs to know how long the run is, and {what}: pass num_steps, the "
            "optimizer steps of the whole run"
        )
    return int(stated.pop())


def _stand_in(optimizer: Any) -> torch.optim.Optimizer:
    """An optimizer with the same settings in as many groups, each of one weight."""
    groups = [{"params": [torch.zeros(1, dtype=torch.float32)]} for _ in optimizer.param_groups]
    made = torch.optim.SGD(groups, lr=0.0)
    for group, own in zip(made.param_groups, optimizer.param_groups, strict=True):
        settings = {key: value for key, value in own.items() if key != "params"}
        group.update((k, v.detach().clone() if isinstance(v, torch.Tensor) else v) for k, v in settings.items())
    made.defaults.update(getattr(optimizer, "defaults", {}))
    return made


def _copied(scheduler: Any, stand_in: torch.optim.Optimizer) -> Any:
    """A deep copy that sets the stand-in's learning rates. A schedule that is a method of something (a trainer, a
    model) stays that something's: only the scheduler's own methods are bound to the copy."""
    memo: dict[int, Any] = {id(scheduler.optimizer): stand_in}
    for leaf in _leaves(scheduler):
        memo[id(leaf.optimizer)] = stand_in
        for value in _held(leaf):
            if isinstance(value, MethodType) and value.__self__ is not leaf:
                memo[id(value)] = value
    return copy.deepcopy(scheduler, memo)


def _is_at_beginning(scheduler: Any) -> bool:
    if isinstance(scheduler, ChainedScheduler):
        return all(map(_is_at_beginning, scheduler._schedulers))
    return any(getattr(scheduler, name, None) == first for name, first in _COUNTERS.items())


def _put_back(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """Make a scheduler that has been stepped, and the learning rates, what they were when it was made.

    By what its constructor does with its arguments once they are attributes, which is known for the schedulers of two
    libraries and not for a class of the user's.
    """
    leaves = list(getattr(scheduler, "_schedulers", [scheduler]))
    modules = {type(one).__module__ for one in (scheduler, *leaves)}
    is_known = all(module.startswith(("torch.optim.", "deepspeed.")) for module in modules)
    if not is_known or any(hasattr(leaf, "_schedulers") for leaf in leaves):
        raise ValueError(
            f"{type(scheduler).__name__} has been stepped already and cannot be put back to its beginning: its first "
            "step has to come after the first step of the optimizer"
        )
    if hasattr(scheduler, "last_batch_iteration"):
        scheduler.last_batch_iteration = -1
        for group, lr in zip(optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = lr
        return
    _set_initial_rates(optimizer)
    for leaf in leaves:
        leaf.last_epoch = -1
        leaf._initial_step()
    if isinstance(scheduler, SequentialLR):
        scheduler.last_epoch = 0
        _set_initial_rates(optimizer)
        scheduler.recursive_undo()
        leaves[bisect_right(scheduler._milestones, 0)]._initial_step()


def _set_initial_rates(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        lr = group["initial_lr"]
        group["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else lr

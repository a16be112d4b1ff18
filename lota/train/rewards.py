"""Rewards: functions of the user's files that judge the model's answers, tried on a few rows before anything runs."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from lota.data.columns import REST
from lota.messages import did_you_mean
from lota.packaged import CONFIGS, find

_NUM_TRIED = 4
_OURS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What TRL hands to a reward beside the columns."""


class Reward:
    """A reward function under TRL's signature: `f(prompts, completions, **columns)` gives a finite number each.

    The columns are the other fields of the rows, one list each, with None where a row lacks the field.
    """

    def __init__(self, spec: str, function: Callable[..., Any]) -> None:
        self._spec, self._function = spec, function
        self.__name__ = function.__name__  # by which TRL logs it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> list[float]:
        """ValueError for a wrong number of values, and for one that is no finite number."""
        rows = [json.loads(text) for text in others.pop(REST)]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        found = self._function(prompts=prompts, completions=completions, **columns, **others)
        if not hasattr(found, "__len__") or len(found) != len(completions):
            number = len(found) if hasattr(found, "__len__") else repr(found)
            raise ValueError(f"reward {self._spec} must return a list of {len(completions)} numbers, got {number}")
        for value, completion in zip(found, completions):
            is_number = isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 1) == 0)
            if not is_number or not math.isfinite(value):
                raise ValueError(
                    f"reward {self._spec} must return finite numbers, got {value!r} for {str(completion)!r:.120}"
                )
        return [float(value) for value in found]


def load(specs: Sequence[str]) -> list[Reward]:
    """The functions that `FILE.py:function` names; a bare word in place of the file is one that comes with lota.
    ValueError for what is not there or cannot be called so."""
    rewards = [Reward(spec, _function(spec)) for spec in specs]
    names = [reward.__name__ for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"reward: every function needs a name of its own to be logged by, got {', '.join(names)}")
    return rewards


def try_out(rewards: Sequence[Reward], rows: Dataset) -> None:
    """Judge empty answers to the first rows, which a model may write too. ValueError with what went wrong."""
    first = rows[:_NUM_TRIED]
    prompts = first["prompt"]
    for row in map(json.loads, first[REST]):
        taken = [name for name in row if name in _OURS]
        if taken:
            raise ValueError(f"a row has the field {taken[0]!r}, which is the name of what a reward gets: rename it")
    is_chat = not isinstance(prompts[0], str)
    answers = [[{"role": "assistant", "content": ""}] if is_chat else "" for _ in prompts]
    for reward in rewards:
        try:
            reward(prompts, answers, **{REST: first[REST]}, **_as_in_training(len(prompts)))
        except ValueError as error:
            raise error if str(error).startswith("reward ") else _failed(reward, error) from error
        except Exception as error:
            raise _failed(reward, error) from error


def _as_in_training(count: int) -> dict[str, Any]:
    return {
        "completion_ids": [[] for _ in range(count)],
        "trainer_state": None,
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }


def _failed(reward: Reward, error: Exception) -> ValueError:
    return ValueError(
        f"reward {reward._spec} failed on an empty answer to a first row: {type(error).__name__}: {error}"
    )


def _function(spec: str) -> Callable[..., Any]:
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name.isidentifier():
        raise ValueError(f"reward must be FILE.py:function, got {spec!r}")
    path = find(CONFIGS, file, ".py") or Path(file)
    if not path.is_file():
        raise ValueError(f"reward {spec}: no such file: {path}")
    module_name = f"lota_reward_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    loading = importlib.util.spec_from_file_location(module_name, path)
    if loading is None or loading.loader is None:
        raise ValueError(f"reward {spec}: {path} is no Python file")
    module = importlib.util.module_from_spec(loading)
    sys.modules[module_name] = module  # as dataclasses and pickle want it
    try:
        loading.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"reward {spec}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"reward {spec}: {path} has no {name}" + did_you_mean(name, known))
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise ValueError(f"reward {spec}: {name} must be a plain function of prompts, completions and **columns")
    return function

"""The choices and defaults of a run, and the check of each: in one place, and without torch, for every front door."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Sequence
from typing import Any

from lota.messages import did_you_mean

METHODS = ("lota", "full", "lora")
SCORES = ("task_vector", "gradient", "fisher", "snip", "magnitude", "random")
GRADIENT_SCORES = ("gradient", "fisher", "snip")
"""Scores that sum over backwards and take no optimizer step."""
STATIC_SCORES = ("magnitude", "random")
"""Scores that look at the weights only."""
BUDGETS = ("global", "per_tensor")
GRADIENT_REDUCTIONS = ("auto", "compact", "dense")
REDUCE_EVERY = ("micro_step", "step")
KERNELS = ("auto", "torch", "triton")
FISHERS = ("empirical", "true")
"""Of an importance: by the answers of the rows, or by answers that are sampled from the model."""
REFERENCES = ("ticket", "model", "precompute")
"""Of preferences: the model itself with the base's values put back at the active entries; a second model; the base's
answers computed before training."""
REWARD_SCORE = "gradient"
"""Where a reward is trained: of the base's own answers, which nobody has to generate with weights that move."""
SERVER_CHECK_STEPS, SERVER_TOLERANCE = 10, 0.05
"""Of a server that writes the answers: how often its log-probabilities are compared with the trainer's, and how far
they may be apart, in nats a token."""
TICKET_FORMS = ("plain", "values", "packed")
"""Values and base values; values, and the difference to the base's; the difference alone, which needs the base (or the
tuned model) to be read."""
STACKING_RULES = ("refuse", "last", "sum")
"""What an entry gets that several tickets have which are on a model at once: a ValueError; the last ticket's value; the
base's value + the sum of the differences."""

DENSITY = 0.1
SCORE = "task_vector"
BUDGET = "global"
CALIBRATION_STEPS = 200
CALIBRATION_RATE_DIVISOR = 10
"""Calibration trains at the run's learning rate divided by this."""
MAX_SKIPPED_STEPS = 10
PULL = 10.0
"""How strongly a run is pulled to what earlier tasks need, where it is."""
ALPHAS = (0.2, 0.4, 0.6, 0.8, 1.0)
"""Points between the values at the start and the trained ones that are measured, beside 0."""
IMPORTANCE_BATCHES, IMPORTANCE_ROWS = 64, 4
"""Micro-batches, and at most so many rows each, from which a task's importance is collected."""


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`; ValueError with the nearest of them otherwise."""
    if value in choices:
        return str(value)
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}" + did_you_mean(value, choices))


def check_density(density: object) -> float:
    """`density` as a float in (0, 1]; ValueError with the likely meaning otherwise (90 -> 0.9)."""
    if isinstance(density, bool) or not isinstance(density, numbers.Real):
        raise ValueError(f"density must be a number in (0, 1], got {density!r}.")
    density = float(density)
    if 0 < density <= 1:
        return density
    meant = f" Did you mean {density / 100:g}?" if 1 < density <= 100 else ""
    raise ValueError(f"density must be in (0, 1], got {density:g}.{meant}")


def check_budget(budget: object) -> str:
    """`budget` if it is "global" or "per_tensor"; ValueError with the closest of them otherwise."""
    if budget in BUDGETS:
        return str(budget)
    close = difflib.get_close_matches(str(budget).lower().replace("-", "_"), BUDGETS, n=1, cutoff=0.5)
    meant = f' Did you mean "{close[0]}"?' if close else ""
    raise ValueError(f'budget must be "global" or "per_tensor", got {budget!r}.{meant}')


def check_reductions(gradient_reduction: str, reduce_every: str) -> None:
    """ValueError for an unknown choice, and for two that do not go together."""
    check_choice("gradient_reduction", gradient_reduction, GRADIENT_REDUCTIONS)
    check_choice("reduce_every", reduce_every, REDUCE_EVERY)
    if gradient_reduction == "dense" and reduce_every == "step":
        raise ValueError(
            "reduce_every='step' with gradient_reduction='dense' would keep whole gradients on every rank until the "
            "end of the step; use reduce_every='micro_step', or gradient_reduction='compact'"
        )


def check_max_skipped_steps(value: Any) -> int:
    """ValueError for anything but a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"max_skipped_steps must be an integer of at least 1, got {value!r}: the run stops after this many "
            "consecutive steps with non-finite gradients"
        )
    return value


def check_pull(pull: Any, retain: Sequence[Any]) -> None:
    """ValueError unless both are given or none, and pull is a positive number."""
    if pull is None and not retain:
        return
    if not retain:
        raise ValueError("pull needs retain: tickets that hold their task's importance, or rows to collect it from")
    if isinstance(pull, bool) or not isinstance(pull, numbers.Real) or not 0 < float(pull) < float("inf"):
        raise ValueError(
            f"retain needs pull, a positive number ({PULL:g}; try 3 and 30), got {pull!r}. Leave both out for no pull"
        )


def check_alpha(alpha: Any) -> float:
    """ValueError for anything but a number from 0 to 1."""
    is_number = isinstance(alpha, numbers.Real) and not isinstance(alpha, bool)
    if not is_number or not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha must be in [0, 1], 0 the values at the start and 1 the trained ones, got {alpha!r}")
    return float(alpha)


def check_rounding_seed(seed: Any) -> int | None:
    """ValueError for anything but None or a seed of stochastic rounding."""
    if seed is not None and (type(seed) is not int or not 0 <= seed < 1 << 63):
        raise ValueError(f"rounding_seed must be an integer in [0, 2**63), or None to round to nearest, got {seed!r}")
    return seed

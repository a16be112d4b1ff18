"""The stages in order of worth (what is right first, then what is fast), and how the minutes are shared among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

MOST_OF_WANTED = 3
"""A stage may use time that is left over, up to so many times what it wants: a hang shall not eat everything."""


@dataclass(frozen=True)
class Stage:
    """One process. function: `module:name`, called with a `Bench`; options: what the Bench hands it.

    seconds: what it wants; least: with less it is left out. packages: distributions without which it cannot run.
    """

    name: str
    tells: str
    function: str
    seconds: float
    least: float
    packages: tuple[str, ...] = ("torch",)
    options: dict[str, Any] = field(default_factory=dict)

    def needs(self, device: str) -> tuple[str, ...]:
        """On a GPU the kernels are Triton's."""
        return (*self.packages, "triton") if device == "cuda" else self.packages


_HERE = "benchmarks.gpu"
_TESTS = ("torch", "pytest")
_ENGINE = ("torch", "deepspeed")
_MODEL = (*_ENGINE, "transformers")
_RECIPE = (*_MODEL, "trl", "datasets", "sentencepiece", "matplotlib")


def _whole_steps(name: str, tells: str, seconds: float, **options: Any) -> Stage:
    packages = (*_MODEL, "peft") if options["method"] == "lora" else _MODEL
    return Stage(name, tells, f"{_HERE}.whole_steps:run", seconds, 18, packages, options)


STAGES = (
    Stage("kernels", "every kernel test on the device", f"{_HERE}.kernel_tests:run", 130, 20, _TESTS),
    Stage("facts", "what a CPU cannot show: dtypes, the index's peak, host time", f"{_HERE}.facts:run", 25, 12),
    Stage("zero3", "ZeRO-3 in one process: phases, importance, pull, resuming", f"{_HERE}.zero3:run", 45, 20, _ENGINE),
    Stage("reducer", "the reducer's asynchronous path on groups of one rank", f"{_HERE}.reducer:run", 25, 12, _ENGINE),
    Stage("step", "the step against its byte floor and its rivals; launch shapes", f"{_HERE}.step:run", 50, 20),
    Stage("recipe", "two tasks and DPO by recipes/, as users start them", f"{_HERE}.recipe:run", 110, 50, _RECIPE),
    _whole_steps("1b-dense", "whole steps of a 1B Llama, dense ZeRO-3 AdamW", 40, method="dense"),
    _whole_steps("1b-sparse-1", "the same, sparse at 1%", 35, method="sparse", density=0.01),
    _whole_steps("1b-sparse-10", "the same, sparse at 10%", 45, method="sparse", density=0.1),
    Stage("8b", "8B at 1% on one GPU, both phases, beside the plan", f"{_HERE}.largest:run", 80, 40, _MODEL),
    Stage("swap", "exchanging tickets on a model of 8B shapes", f"{_HERE}.swap:run", 45, 15),
    _whole_steps("1b-lora", "whole steps of a 1B Llama, LoRA r16", 30, method="lora"),
    Stage("memory-checker", "kernels under compute-sanitizer", f"{_HERE}.kernel_tests:run_checker", 60, 20, _TESTS),
)


def chosen(names: Iterable[str] | None, stages: Sequence[Stage] = STAGES) -> list[Stage]:
    """The named stages in their order; ValueError for a name that there is not."""
    if names is None:
        return list(stages)
    wanted = list(names)
    known = [stage.name for stage in stages]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"expected stages among {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return [stage for stage in stages if stage.name in wanted]


def time_for(stage: Stage, later: Sequence[Stage], left: float) -> float | None:
    """Seconds that a stage may take of the `left` ones; None where they are fewer than its least.

    It gets what it wants, and on top what the later ones do not want.
    """
    spare = left - sum(other.seconds for other in later)
    limit = min(max(min(stage.seconds, left), spare), MOST_OF_WANTED * stage.seconds)
    return limit if limit >= stage.least else None

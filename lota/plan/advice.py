"""What fits into a memory, and which single change makes fit what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lota.plan.layout import RankLayout
from lota.plan.methods import MethodPlan
from lota.plan.text import format_bytes

_MOST_RANKS = 1 << 14
_DENSITIES = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)


@dataclass(frozen=True)
class Choice:
    """What a plan was made from, so that one thing of it can be changed. make(choice): the plan."""

    layout: RankLayout
    make: Callable[[Choice], MethodPlan]
    density: float | None = None
    reduction: str | None = None
    reduce_every: str | None = None
    score: str | None = None


def advise(choice: Choice, memory: int) -> list[str]:
    """Lines for one plan: that it fits, or every single change that makes it fit, or that none does."""
    plan = choice.make(choice)
    if plan.peak <= memory:
        return [f"{plan.name}: fits, {format_bytes(memory - plan.peak)} are left for activations"]
    lines = [f"{plan.name}: does not fit, {format_bytes(plan.peak)} against {format_bytes(memory)}"]
    fitting = [(text, made) for text, made in _changes(choice, memory) if made.peak <= memory]
    lines += [f"    {text}: {format_bytes(made.peak)}" for text, made in fitting]
    if not fitting:
        smallest = min((made for _, made in _changes(choice, memory)), key=lambda made: made.peak, default=plan)
        lines.append(f"    no single change makes it fit; the best of them needs {format_bytes(smallest.peak)}")
    return lines


def _changes(choice: Choice, memory: int) -> Iterator[tuple[str, MethodPlan]]:
    """Single changes with their plans; of a series (ranks, densities) the first that fits, else the last."""
    layout = choice.layout
    series: list[list[tuple[str, Choice]]] = []
    if layout.shard_size < layout.ranks:
        sizes = [s for s in range(layout.shard_size + 1, layout.ranks + 1) if layout.ranks % s == 0]
        series.append([(f"shard_group_size {s}", _moved(choice, shard_group_size=s)) for s in sizes])
    if layout.shard_group_size is None:
        ranks = layout.ranks * 2
        more: list[tuple[str, Choice]] = []
        while ranks <= _MOST_RANKS:
            more.append((f"{ranks} ranks", _moved(choice, ranks=ranks)))
            ranks *= 2
        series.append(more)
    if choice.density is not None:
        lower = [d for d in _DENSITIES if d < choice.density]
        series.append([(f"density {d:g}", replace(choice, density=d)) for d in lower])
    if choice.reduction == "compact" and choice.reduce_every != "step":
        series.append([("gradient_reduction dense", replace(choice, reduction="dense"))])
    if choice.reduce_every == "step":
        series.append([("reduce_every micro_step", replace(choice, reduce_every="micro_step"))])
    if choice.score == "task_vector":
        series.append([("score gradient", replace(choice, score="gradient"))])
    if choice.reduction is None and choice.score in (None, "task_vector") and not layout.offload_optimizer:
        series.append([("offload_optimizer to the CPU", _moved(choice, offload_optimizer=True))])
    if choice.reduction is not None and not layout.offload_param:
        series.append([("offload_param to the CPU", _moved(choice, offload_param=True))])
    for steps in series:
        made = None
        for text, changed in steps:
            made = text, changed.make(changed)
            if made[1].peak <= memory:
                break
        if made is not None:
            yield made


def _moved(choice: Choice, **changes: object) -> Choice:
    return replace(choice, layout=replace(choice.layout, **changes))  # type: ignore[arg-type]

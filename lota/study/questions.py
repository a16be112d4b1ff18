"""The questions of the study, each a function from a preset and the rows that are known to the runs it wants.

A question is asked again when its runs are done: a sweep over rates comes first, at the first seed; the settings that a
method's frontier runs through are then repeated at the other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lota.choices import STATIC_SCORES
from lota.study.analysis import best_setting, points
from lota.study.frontier import best_settings, levels
from lota.study.methods import (
    FULL,
    MODEL,
    WHOLE,
    Method,
    Scene,
    importance_run,
    lora,
    own_ticket,
    runs_of,
    training,
)
from lota.study.presets import Preset
from lota.study.rows import Rows
from lota.study.runs import Measure, Run


def swept(
    preset: Preset, rows: Rows, methods: Sequence[Method], scene: Callable[[int], Scene], most: int = 1
) -> Iterator[Run]:
    """Every method's sweep at the first seed; then at the others the settings that its frontier runs through there, at
    most so many.

    The first method is the one whose gain the levels are shares of.
    """
    first, *others = preset.seeds
    at_first = scene(first)
    found = {}
    for method in methods:
        yield from runs_of(preset, at_first, method)
        found[method.name] = points(rows, at_first.question, method.name, first, at_first.tasks[0])
    if not all(found.values()):
        return
    *reference, start = found[methods[0].name]
    wanted = levels(start.new_dev, [replace(point, new=point.new_dev) for point in reference], preset.levels)
    for method in methods:
        again = best_settings(found[method.name], wanted, most)
        for seed in others:
            yield from runs_of(preset, scene(seed), method, again)


def q1(preset: Preset, rows: Rows) -> Iterator[Run]:
    """One task: densities, LoRA, full; on the other two tasks the main ones; scores, and steps of calibration."""

    def scene(task: str) -> Callable[[int], Scene]:
        return lambda seed: Scene("q1", MODEL, "base", (task,), seed, keeps=seed == preset.seeds[0])

    task, *more = preset.tasks.unlike
    full, one = Method("full", "full", None, FULL), Method("ticket 10%", "0.1", 0.1)
    main = [full, Method("LoRA r8", "lora", None, lora(8)), one]
    named = {f"ticket {density:.3g}%": density / 100 for density in (50, 1, 0.1) if density / 100 in preset.densities}
    tickets = [Method(name, f"{density:g}", density) for name, density in named.items()]
    yield from swept(preset, rows, [*main, Method("LoRA r64", "lora", None, lora(64)), *tickets], scene(task))
    for another in more:
        yield from swept(preset, rows, main, scene(another))
    best = best_setting(rows, "q1", "ticket 10%", preset.seeds[0], task)
    if best is None:
        return
    variants = [
        _named(one, score, options=_scored(preset, score))
        for score in ("gradient", "fisher", "snip", "magnitude", "random")
    ]
    steps = [count for count in (1, 10, 100) if count != preset.calibration_steps]
    variants += [_named(one, f"{number} calibration steps", calibration_steps=number) for number in steps]
    variants.append(_named(one, "counted", is_counted=True))
    for method in variants:
        yield from runs_of(preset, scene(task)(preset.seeds[0]), method, [best])


def _scored(preset: Preset, score: str) -> dict[str, Any]:
    steps = {} if score in STATIC_SCORES else {"calibration_steps": preset.calibration_steps}
    return {"score": score, **steps}


def q2_methods(preset: Preset) -> list[Method]:
    """Two tasks in sequence."""
    few = preset.pulls[-2:-1] or preset.pulls
    full, whole = Method("full", "full", None, FULL), Method("full", "full", 1, WHOLE)
    one, three = Method("ticket 10%", "0.1", 0.1), Method("ticket 30%", "0.3", 0.3)
    made = [full, Method("LoRA r16", "lora", None, lora(16)), one, three]
    made += [_named(method, "replay", replay=0.1) for method in (full, one)]
    made += [_pulled(method, "pull", "ticket", preset.pulls) for method in (whole, one, three)]
    made += [_pulled(method, "pull to general text", "general", few) for method in (whole, three)]
    made += [_pulled(method, "pull, replay", "ticket", few, replay=0.1) for method in (whole, one, three)]
    return made + [_pulled(method, "pull, counted", "ticket", few, is_counted=True) for method in (one, three)]


def _pulled(method: Method, name: str, retain: str, pulls: tuple[float, ...], **more: Any) -> Method:
    """With a pull: the lowest rate of the sweep gives way to several values of K."""
    return _named(method, name, retain=retain, pulls=pulls, is_fast=True, **more)


def _named(method: Method, name: str, **changes: Any) -> Method:
    return replace(method, name=f"{method.name}, {name}", **changes)


def q2(preset: Preset, rows: Rows) -> Iterator[Run]:
    """Forgetting of the old task at matched quality of the new one."""
    old, new = preset.tasks.old, preset.tasks.new

    def before(seed: int) -> tuple[Run, Run]:
        first = own_ticket(preset, old, seed, "first task", (old,))
        return first, importance_run(f"run:{first.name}//merged", f"after-{old}", seed)

    def scene(seed: int) -> Scene:
        first, general = before(seed)
        ticket = f"run:{first.name}//ticket"
        retained = {"ticket": ticket, "general": f"run:{general.name}//importance.safetensors"}
        return Scene(
            "q2", f"run:{first.name}//merged", f"after-{old}", (new, old), seed, replayed=old, retained=retained,
            importance=ticket,
        )  # fmt: skip

    for seed in preset.seeds:
        yield from before(seed)
    methods = [method for method in q2_methods(preset) if not preset.methods or method.name in preset.methods]
    yield from swept(preset, rows, methods, scene, most=2)


def q3(preset: Preset, rows: Rows) -> Iterator[Run]:
    """Five tasks in sequence: full fine-tuning, LoRA, tickets that share no entry, and those with the pull."""
    for seed in preset.seeds[:1]:
        for method in ("full", "LoRA r16", "ticket 10%", "ticket 10%, pull"):
            rate = _rate(preset, method)
            common = training(preset, MODEL, preset.tasks.sequence[0], rate, seed, preset.steps)
            del common["train_file"]
            if method.startswith("ticket"):
                common |= {"method": "lota", "density": 0.1, "calibration_steps": preset.calibration_steps}
                common |= {"calibration_learning_rate": preset.calibration_rate}
            else:
                common |= {"method": "full"} if method == "full" else lora(16) | {"merged": False}
            if "pull" in method:
                common["pull"] = preset.pulls[1]
            tasks = [
                {"name": task, "train_file": [f"data:{task}/train.jsonl"], "eval_file": [f"data:{task}/test.jsonl"]}
                for task in preset.tasks.sequence
            ]
            options = {**common, "eval_rows_limit": preset.data.num_test, "tasks": tasks}
            facts = {"question": "q3", "method": method, "setting": f"{rate:g}", "rate": rate, "seed": seed}
            yield Run(f"q3/{method}/s{seed}", "sequence", options, None, facts)


def _rate(preset: Preset, method: str) -> float:
    """The middle one of a method's sweep; with the pull the upper one."""
    sweep = "lora" if "LoRA" in method else "0.1" if "ticket" in method else "full"
    return preset.rates[sweep][-1] if "pull" in method else preset.middle(sweep)


def _middle(preset: Preset, method: Method) -> list[str]:
    """The setting of a method that has the middle rate, and one value of K at most."""
    return [name for name, (rate, _) in method.settings(preset).items() if rate == preset.middle(method.sweep)]


def q4(preset: Preset, rows: Rows) -> Iterator[Run]:
    """Merging: what each task keeps of its gain, of tickets, full task vectors and LoRA trained alone (question 1)."""
    tasks, seed = preset.tasks.unlike, preset.seeds[0]
    for method in ("ticket 10%", "full", "LoRA r8"):
        best = [best_setting(rows, "q1", method, seed, task) for task in tasks]
        if None in best:
            continue
        made = [f"run:q1/{task}/{method}/{setting}/s{seed}" for task, setting in zip(tasks, best, strict=True)]
        for how, more in (("sum", {}), ("ties", {"density": 0.2})):
            options = {"of": made, "base": MODEL, "method": how, **more}
            measure = Measure(MODEL, tuple(f"data:{task}" for task in tasks), (1.0, 0.8, 0.6, 0.4))
            facts = {"question": "q4", "method": f"{method}, {how}", "setting": "merged", "seed": seed}
            yield Run(f"q4/{method}/{how}", "merge", options, measure, facts)


def q5(preset: Preset, rows: Rows) -> Iterator[Run]:
    """Safety: a refusal policy first, then benign and adversarial tuning."""
    for seed in preset.seeds:
        policy = own_ticket(preset, "policy", seed, "policy", ("policy", "refused"), generate=("data:refused",))
        yield policy
        ticket = f"run:{policy.name}//ticket"
        full, one = Method("full", "full", None, FULL), Method("ticket 10%", "0.1", 0.1)
        protected = _named(one, "protected", options={"protect": [ticket]})
        pulled = [replace(Method("full", "full", 1, WHOLE), name="full, pull"), _named(protected, "pull")]
        pulled = [replace(method, retain="ticket", pulls=preset.pulls[1:2]) for method in pulled]
        methods = [full, one, protected, *pulled]
        for task in (preset.tasks.new, "harmful"):
            scene = Scene(
                "q5", f"run:{policy.name}//merged", "after-policy", (task, "refused"), seed, generate=("refused",),
                retained={"ticket": ticket}, importance=ticket,
            )  # fmt: skip
            for method in methods:
                yield from runs_of(preset, scene, method, _middle(preset, method))


QUESTIONS: Mapping[str, Callable[[Preset, Rows], Iterator[Run]]] = {"q1": q1, "q2": q2, "q3": q3, "q4": q4, "q5": q5}

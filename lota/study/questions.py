"""The questions of the study, each a function from a preset and the rows that are known to the runs it wants.

A question is asked again when its runs are done: a sweep over rates comes first, at the first seed; the settings that a
method's frontier runs through are then repeated at the other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lota.study.frontier import Point, best_settings, levels
from lota.study.presets import Preset
from lota.study.rows import Rows
from lota.study.runs import Measure, Run

BASE = "base"
MAX_REPEATED = 2


@dataclass(frozen=True)
class Method:
    """What is compared. sweep: whose learning rates it takes. density: of a ticket. options: of `lota train`, beside
    rate, data and seed. pulls: values of K. facts: columns of its rows."""

    name: str
    sweep: str
    density: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pulls: tuple[float, ...] = ()
    replay: float = 0.0
    is_counted: bool = False
    times: float = 1.0


def base_run(preset: Preset) -> Run:
    """The pretrained model, which all others start from."""
    options = {"texts": "data:pretraining.jsonl", "tokenizer": "data:tokenizer", "config": vars(preset.base)}
    return Run(BASE, "base", options)


def training(preset: Preset, start: str, task: str, rate: float, seed: int, steps: int | None = None) -> dict[str, Any]:
    """Options of `lota train` that all methods have in common."""
    return {
        "model_name_or_path": start,
        "train_file": [f"data:{task}/train.jsonl"],
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, preset.steps // 16),
        "max_steps": steps or preset.steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": preset.micro_rows,
        "global_batch_size": preset.batch_rows,
        "max_length": preset.base.max_length,
        "bf16": preset.bf16,
        "gradient_checkpointing": False,
        "logging_steps": max(1, preset.steps // 4),
        "save_strategy": "no",
        "seed": seed,
    }


def first_task(preset: Preset, seed: int) -> Run:
    """The old task's own ticket, at 10%, on the base; its merged model is what the new task begins with."""
    task, density, rate = preset.tasks.old, 0.1, preset.rates["0.1"][1]
    options = training(preset, f"run:{BASE}//model", task, rate, seed) | {
        "method": "lota",
        "density": density,
        "calibration_steps": preset.calibration_steps,
        "calibration_learning_rate": preset.calibration_rate,
        "merged": True,
    }
    measure = Measure(f"run:{BASE}//model", (f"data:{task}",))
    facts = {"question": "first task", "method": "ticket 10%", "rate": rate, "seed": seed}
    return Run(f"first/s{seed}", "train", options, measure, facts)


def calibration(preset: Preset, start: str, place: str, task: str, seed: int, steps: int | None = None) -> Run:
    """A dense calibration and masks of all densities cut from it."""
    options = training(preset, start, task, preset.calibration_rate, seed) | {
        "method": "lota",
        "calibration_steps": steps or preset.calibration_steps,
        "calibration_learning_rate": preset.calibration_rate,
        "cuts": sorted({0.3, 0.1, *preset.densities}),
    }
    del options["max_steps"]
    return Run(f"calibration/{place}/{task}/{steps or preset.calibration_steps}/s{seed}", "calibrate", options)


def method_runs(
    preset: Preset, question: str, method: Method, start: str, place: str, tasks: Sequence[str], seed: int,
    settings: Sequence[str] | None = None, old_train: str | None = None,
) -> Iterator[Run]:
    """The sweep of a method at a seed, or those of its settings that are named; calibrations come along.

    tasks: the new one, then those to be kept.
    """  # fmt: skip
    for rate in preset.rates[method.sweep]:
        rate *= method.times
        for pull in method.pulls or (0.0,):
            setting = f"{rate:g}" + (f" K{pull:g}" if pull else "")
            if settings is not None and setting not in settings:
                continue
            steps = preset.steps - (preset.calibration_steps if method.is_counted else 0)
            options = training(preset, start, tasks[0], rate, seed, steps) | dict(method.options)
            if method.density is not None and method.density < 1 and "score" not in method.options:
                made = calibration(preset, start, place, tasks[0], seed)
                yield made
                options |= {"method": "lota", "mask": f"run:{made.name}//mask-{method.density:g}"}
            elif method.density is not None:
                options |= {"method": "lota", "density": method.density}
            else:
                options |= {"merged": True}
            if pull:
                options["pull"] = pull
            if method.replay:
                del options["train_file"]
                parts = ((tasks[0], 1 - method.replay), (old_train, method.replay))
                options["mixture"] = [{"train_file": [f"data:{t}/train.jsonl"], "weight": w} for t, w in parts]
            facts = {"question": question, "method": method.name, "rate": rate, "pull": pull, "setting": setting}
            facts |= {"density": method.density, "replay": method.replay, "steps": steps, "seed": seed}
            facts |= {"calibration": preset.calibration_steps if "mask" in options else 0}
            measure = Measure(start, tuple(f"data:{task}" for task in tasks), preset.alphas)
            yield Run(f"{question}/{method.name}/{setting}/s{seed}", "train", options, measure, facts)


def q2_methods(preset: Preset, has_pull: bool) -> list[Method]:
    """Two tasks in sequence."""
    lora = {"method": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    full = {"method": "full"}
    found = [
        Method("full", "full", None, full),
        Method("LoRA r16", "lora", None, lora),
        Method("ticket 10%", "0.1", 0.1),
        Method("ticket 30%", "0.3", 0.3),
        Method("full, replay", "full", None, full, replay=0.1),
        Method("ticket 10%, replay", "0.1", 0.1, replay=0.1),
    ]
    if not has_pull:
        return found
    ...
    return found


def points(rows: Rows, question: str, method: str, seed: int) -> list[Point]:
    """A method's points at a seed, and the start."""
    own = [r for r in rows if (r.get("question"), r.get("method"), r.get("seed")) == (question, method, seed)]
    made = [Point(r["new_test"], r["old_test_rise"], r["new_dev"], r["old_dev_rise"], r["setting"]) for r in own]
    if own:
        start = own[0]
        dev, test = (start[f"new_{part}"] - start[f"new_{part}_rise"] for part in ("dev", "test"))
        made.append(Point(test, 0.0, dev, 0.0))
    return made


def q2(preset: Preset, rows: Rows, has_pull: bool = False) -> Iterator[Run]:
    """Forgetting of the old task at matched quality of the new one."""
    first, *others = preset.seeds
    methods = q2_methods(preset, has_pull)
    yield from _two_tasks(preset, methods, first, dict.fromkeys([m.name for m in methods]))
    at_first = {method.name: points(rows, "q2", method.name, first) for method in methods}
    if any(not found for found in at_first.values()):
        return
    reference = at_first["full"]
    start = reference[-1]
    wanted = levels(start.new_dev, [Point(p.new_dev, 0, 0, 0) for p in reference], preset.levels)
    again = {m.name: best_settings(at_first[m.name], wanted, MAX_REPEATED) for m in methods}
    for seed in others:
        yield from _two_tasks(preset, methods, seed, again)


def _two_tasks(
    preset: Preset, methods: Sequence[Method], seed: int, settings: Mapping[str, Sequence[str] | None]
) -> Iterator[Run]:
    start = first_task(preset, seed)
    yield start
    tasks = (preset.tasks.new, preset.tasks.old)
    for method in methods:
        yield from method_runs(
            preset, "q2", method, f"run:{start.name}//merged", f"after-{preset.tasks.old}", tasks, seed,
            settings[method.name], preset.tasks.old,
        )  # fmt: skip


QUESTIONS: Mapping[str, Callable[[Preset, Rows], Iterator[Run]]] = {"q2": q2}

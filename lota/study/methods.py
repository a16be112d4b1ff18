"""What is compared: methods, as options of `lota train`, and the runs of their sweeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lota.study.presets import Preset
from lota.study.runs import Measure, Run

BASE = "base"
MODEL = f"run:{BASE}//model"


@dataclass(frozen=True)
class Method:
    """sweep: whose learning rates it takes; of three, with `is_fast`, the upper two. density: of a ticket; 1 trains all
    eligible entries by the kernels of tickets. options: of `lota train`, beside rate, data, seed. retain: which of the
    scene's importances it is pulled by; pulls: values of K. is_counted: the steps of its calibration count as its own.
    """

    name: str
    sweep: str
    density: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    retain: str | None = None
    pulls: tuple[float, ...] = (0.0,)
    replay: float = 0.0
    is_fast: bool = False
    is_counted: bool = False
    calibration_steps: int | None = None

    def settings(self, preset: Preset) -> dict[str, tuple[float, float]]:
        """Rate and K by the name of the setting."""
        rates = preset.rates[self.sweep]
        rates = rates[1:] if self.is_fast and len(rates) > 2 else rates
        return {f"{rate:g}" + (f" K{pull:g}" if pull else ""): (rate, pull) for rate in rates for pull in self.pulls}


@dataclass(frozen=True)
class Scene:
    """Where methods are compared. start: the model they begin with; place: its name in names. tasks: the new one, then
    what is to be kept. replayed: whose rows are mixed in. retained: importances by name; importance: the one that
    movement is weighed with."""

    question: str
    start: str
    place: str
    tasks: tuple[str, ...]
    seed: int
    replayed: str | None = None
    generate: tuple[str, ...] = ()
    retained: Mapping[str, str] = field(default_factory=dict)
    importance: str | None = None
    keeps: bool = False


FULL = {"method": "full", "merged": True}
WHOLE = {"score": "magnitude"}
"""With density 1: every eligible entry, by the kernels of tickets."""


def lora(rank: int) -> dict[str, Any]:
    return {"method": "lora", "lora_r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "merged": True}


def base_run(preset: Preset) -> Run:
    """The pretrained model, which all others start from."""
    options = {"texts": "data:pretraining.jsonl", "tokenizer": "data:tokenizer", "config": vars(preset.base)}
    return Run(BASE, "base", options, keeps=True)


def training(preset: Preset, start: str, task: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """Options of `lota train` that all methods have in common."""
    return {
        "model_name_or_path": start,
        "train_file": [f"data:{task}/train.jsonl"],
        "learning_rate": rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, preset.steps // 16),
        "max_steps": steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": preset.micro_rows,
        "global_batch_size": preset.batch_rows,
        "max_length": preset.data.max_length,
        "bf16": preset.bf16,
        "gradient_checkpointing": False,
        "logging_steps": max(1, preset.steps // 4),
        "save_strategy": "no",
        "seed": seed,
    }


def own_ticket(preset: Preset, task: str, seed: int, name: str, measured: tuple[str, ...], **more: Any) -> Run:
    """A task's ticket at 10% on the base, with its importance and the merged model; one run, calibration included."""
    rate = preset.middle("0.1")
    options = training(preset, MODEL, task, rate, seed, preset.steps) | {
        "method": "lota",
        "density": 0.1,
        "calibration_steps": preset.calibration_steps,
        "calibration_learning_rate": preset.calibration_rate,
        "keep_importance": True,
        "merged": True,
    }
    facts = {"question": name, "method": "ticket 10%", "rate": rate, "seed": seed, "setting": f"{rate:g}"}
    measure = Measure(MODEL, tuple(f"data:{task}" for task in measured), **more)
    return Run(f"{name}/{task}/s{seed}", "train", options, measure, facts, keeps=True)


def importance_run(start: str, place: str, seed: int) -> Run:
    """What general text needs of all weights of a model."""
    options = {"model": start, "texts": "data:general_train.jsonl", "micro_batches": 64, "micro_rows": 4}
    return Run(f"importance/{place}/s{seed}", "importance", options)


def calibration(preset: Preset, scene: Scene, method: Method) -> Run:
    """A dense calibration, and masks of all densities cut from it."""
    steps = method.calibration_steps or preset.calibration_steps
    options = training(preset, scene.start, scene.tasks[0], preset.calibration_rate, scene.seed, steps)
    del options["max_steps"]
    options |= {
        "method": "lota",
        "calibration_steps": steps,
        "calibration_learning_rate": preset.calibration_rate,
        "cuts": sorted({0.5, 0.3, 0.1, 0.01, 0.001}),
    }
    if protect := method.options.get("protect"):
        options |= {"protect": protect, "cuts": [0.1]}
    kind = "protected" if protect else "free"
    return Run(f"calibration/{scene.place}/{scene.tasks[0]}/{kind}/{steps}/s{scene.seed}", "calibrate", options)


def runs_of(preset: Preset, scene: Scene, method: Method, settings: Sequence[str] | None = None) -> Iterator[Run]:
    """The sweep of a method, or those of its settings that are named; the calibration comes along."""
    for setting, (rate, pull) in method.settings(preset).items():
        if settings is not None and setting not in settings:
            continue
        calibrates = method.density is not None and "score" not in method.options
        steps_before = (method.calibration_steps or preset.calibration_steps) if calibrates else 0
        steps = preset.steps - (steps_before if method.is_counted else 0)
        options = training(preset, scene.start, scene.tasks[0], rate, scene.seed, steps) | dict(method.options)
        if calibrates:
            made = calibration(preset, scene, method)
            yield made
            options |= {"method": "lota", "mask": f"run:{made.name}//mask-{method.density:g}"}
            options.pop("protect", None)  # its calibration has seen to it
        elif method.density is not None:
            options |= {"method": "lota", "density": method.density}
        if pull:
            options |= {"retain": [scene.retained[str(method.retain)]], "pull": pull}
        if method.replay:
            parts = ((scene.tasks[0], 1 - method.replay), (scene.replayed, method.replay))
            options["mixture"] = [
                {"train_file": [f"data:{task}/train.jsonl"], "weight": share} for task, share in parts
            ]
            del options["train_file"]
        facts = {"question": scene.question, "method": method.name, "setting": setting, "rate": rate, "pull": pull}
        facts |= {"density": method.density, "replay": method.replay, "steps": steps, "calibration": steps_before}
        facts |= {"seed": scene.seed}
        measure = Measure(
            scene.start,
            tuple(f"data:{task}" for task in scene.tasks),
            preset.alphas,
            scene.importance,
            tuple(f"data:{task}" for task in scene.generate),
        )
        name = f"{scene.question}/{scene.tasks[0]}/{method.name}/{setting}/s{scene.seed}"
        yield Run(name, "train", options, measure, facts, keeps=scene.keeps)

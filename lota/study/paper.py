"""The study at the paper's size: Llama 8B and Mistral 7B on 8 GPUs, six families of tasks, as commands to be run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MODELS = {"llama31_8b": "meta-llama/Llama-3.1-8B", "mistral_7b": "mistralai/Mistral-7B-v0.1"}
TASKS = ("gsm8k", "commonsense", "sql", "samsum", "ultrachat", "safety")
PAIRS = (("gsm8k", "commonsense"), ("commonsense", "gsm8k"), ("safety", "gsm8k"))
SEEDS = (0, 1, 2)
FOLDER = "runs/paper/configs"
FULL_RATES = (3e-7, 1e-6, 3e-6)
LORA_RATES = (3e-5, 1e-4, 3e-4)
TICKET_RATES = (3e-6, 1e-5, 3e-5)


@dataclass(frozen=True)
class Command:
    """One `lota train` on 8 GPUs. config: a packaged configuration, which FOLDER has a copy of; options win."""

    out: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """Of `lota train`."""
        made = ["--config", f"{FOLDER}/{self.config}.yaml", "--output_dir", self.out]
        for name, value in self.options.items():
            made += [f"--{name}", *(map(str, value) if isinstance(value, list) else [_text(value)])]
        return made

    def __str__(self) -> str:
        return f"deepspeed --module lota train {shlex.join(self.words)}"


def commands() -> Iterator[Command]:
    """One task each, every method at its sweep; then pairs in sequence, with the pull and without."""
    for model in MODELS:
        for task in TASKS:
            for name, options, rates in _methods():
                for rate in rates:
                    out = f"runs/paper/{model}/{task}/{name}/{rate:g}/s0"
                    yield Command(out, f"{model}_{task}", options | {"learning_rate": rate, "seed": 0})
        for old, new in PAIRS:
            for seed in SEEDS:
                yield from _pair(model, old, new, seed)


def _methods() -> Iterator[tuple[str, dict[str, Any], tuple[float, ...]]]:
    ticket = {"method": "lota", "keep_importance": True, "merged": True}
    yield "full", {"method": "full", "merged": True}, FULL_RATES
    yield "lora8", {"method": "lora", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "merged": True}, LORA_RATES
    yield "lora64", {"method": "lora", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0, "merged": True}, LORA_RATES
    yield "ticket10", ticket | {"density": 0.1}, TICKET_RATES
    yield "ticket1", ticket | {"density": 0.01}, TICKET_RATES


def _pair(model: str, old: str, new: str, seed: int) -> Iterator[Command]:
    """The old task's ticket, and the new task on its model."""
    place = f"runs/paper/{model}/{old}-then-{new}/s{seed}"
    keeping = {"method": "lota", "density": 0.1, "keep_importance": True, "merged": True, "seed": seed}
    yield Command(f"{place}/first", f"{model}_{old}", keeping)
    start = {"model_name_or_path": f"{place}/first/merged", "seed": seed, "merged": True}
    pulled = {"retain": [f"{place}/first/ticket"], "pull": 10}
    ticket, whole = {"method": "lota"}, {"method": "lota", "density": 1, "score": "magnitude"}
    for name, options, rate in (
        ("full", {"method": "full"}, FULL_RATES[1]),
        ("lora64", {"method": "lora", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.0}, LORA_RATES[1]),
        ("ticket10", ticket | {"density": 0.1}, TICKET_RATES[1]),
        ("ticket10-pull", ticket | {"density": 0.1} | pulled, TICKET_RATES[2]),
        ("ticket30-pull", ticket | {"density": 0.3} | pulled, TICKET_RATES[2]),
        ("full-pull", whole | pulled, FULL_RATES[2]),
    ):
        yield Command(f"{place}/{name}", f"{model}_{new}", start | options | {"learning_rate": rate})


def show() -> None:
    """Print every command, those that write the configurations first."""
    print(f"mkdir -p {FOLDER}")
    for config in dict.fromkeys(command.config for command in commands()):
        print(f"lota config {config} --out {FOLDER}/{config}.yaml")
    for command in commands():
        print(command)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)

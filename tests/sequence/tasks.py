"""A base of a few thousand weights and five small tasks for it: what to do with three letters."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lota.ticket import BaseTensor, Mask, Ticket, fingerprint, to_hex
from tests.data import tiny

LETTERS = tiny.WORDS[:8]
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda words: words,
    "reverse": lambda words: words[::-1],
    "rotate": lambda words: words[1:] + words[:1],
    "shift": lambda words: [LETTERS[(LETTERS.index(word) + 1) % 8] for word in words],
    "sort": sorted,
}


def make_world(folder: Path) -> Path:
    """base/, and NAME_train.jsonl and NAME_test.jsonl of every task."""
    torch.manual_seed(5)
    tiny.save(folder / "base", hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
    texts = [list(chosen) for chosen in itertools.permutations(LETTERS, 3)]
    random.Random(0).shuffle(texts)
    for number, (name, answer) in enumerate(TASKS.items()):
        mark = tiny.WORDS[8 + number]
        rows = [
            {"prompt": f"{mark} {' '.join(text)}", "completion": " " + " ".join(answer(text))} for text in texts[:150]
        ]
        for part, chosen in (("train", rows[:128]), ("test", rows[128:])):
            path = folder / f"{name}_{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
    return folder


def task(world: Path, name: str, **changes: Any) -> dict[str, Any]:
    """An entry of `tasks`."""
    files = {"train_file": str(world / f"{name}_train.jsonl"), "eval_file": str(world / f"{name}_test.jsonl")}
    return {"name": name, **files, **changes}


def content(world: Path, tasks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A whole configuration."""
    options: dict[str, Any] = {
        "model_name_or_path": str(world / "base"),
        "tasks": tasks,
        "density": 0.15,
        "score": "gradient",
        "calibration_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 22,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 2,
    }
    return {name: value for name, value in (options | changes).items() if value is not None}


def write(path: Path, made: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    return str(path)


def make_ticket(base: Path, numbers: range, seed: int, on: dict[str, Tensor] | None = None) -> Ticket:
    """New values for the entries of the blocks' matrices whose number is in `numbers` (modulo 10). on: weights that it
    is made for, in place of the base's."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors") if on is None else on
    chosen = {name: tensor for name, tensor in weights.items() if "_proj" in name}
    mask = Mask.from_dense(
        {n: torch.isin(torch.arange(w.numel()) % 10, torch.tensor([*numbers])).view(w.shape) for n, w in chosen.items()}
    ).with_base(
        {name: _identity(tensor) for name, tensor in chosen.items()},
        {name: _identity(tensor) for name, tensor in weights.items() if name not in chosen},
    )
    before = {name: chosen[name].flatten()[mask.indices(name)] for name in mask.names}
    values = {name: before[name] + torch.randn(before[name].shape, generator=generator) / 4 for name in mask.names}
    return Ticket(mask, values, before)


def _identity(tensor: Tensor) -> BaseTensor:
    return BaseTensor(str(tensor.dtype).removeprefix("torch."), to_hex(fingerprint(tensor.flatten())))

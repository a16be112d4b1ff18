"""Recipes run inside the ranks of the tests' pool, which spares their start, and what comparisons need of them."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_recipe(name: str, argv: list[str]) -> None:
    """`recipes/NAME.py ARGV` on this rank."""
    import importlib

    before, sys.argv = sys.argv, [f"recipes/{name}.py", *argv]
    try:
        importlib.import_module(f"recipes.{name}").main()
    finally:
        sys.argv = before
        forget()


def forget(trainer: Any = None) -> None:
    """Let go of a trainer's engine and of the process-wide state that the next one makes again."""
    from accelerate.state import AcceleratorState

    if trainer is not None and getattr(trainer, "deepspeed", None) is not None:
        trainer.deepspeed.destroy()
    gc.collect()
    AcceleratorState._reset_state(True)


def losses(output: Path) -> list[float]:
    """The training losses in metrics.jsonl."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row["loss"] for row in rows if "loss" in row and row["phase"] == "train"]


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text(encoding="utf-8"))

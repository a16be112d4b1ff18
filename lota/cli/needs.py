"""Which extra of the package a command needs, for whoever has only the core."""

from __future__ import annotations

from collections.abc import Sequence

_EXTRAS = {
    "train": "recipes",
    "dpo": "recipes",
    "calibrate": "recipes",
    "sequence": "recipes",
    "matrix": "recipes",
    "demo": "recipes",
    "report": "recipes",
    "evaluate": "eval",
}
"""Of commands that need one in any case; the others need one for some of their options."""
_BROUGHT_BY = {"matplotlib": "recipes", "peft": "recipes", "rouge_score": "eval", "lm_eval": "eval"}


def missing(error: ModuleNotFoundError, argv: Sequence[str]) -> str:
    """One line: what is not installed, and the extra that brings it."""
    command = next((word for word in argv if not word.startswith("-")), "")
    extra = _EXTRAS.get(command) or _BROUGHT_BY.get((error.name or "").split(".")[0], "train")
    return f"lota {command} needs {error.name}, which is not installed: pip install 'lota[{extra}]'"

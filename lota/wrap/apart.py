"""Both phases of a command write for themselves: `{phase}` in its words, and what can be seen of its output folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lota.wrap.order import CALIBRATION, TRAINING

_OPTION = re.compile(r"(?:--)?output[_-]dir(?:=(.*))?", re.DOTALL)
_IN_FILE = re.compile(r"""^\s*["']?output_dir["']?\s*:\s*["']?([^"'#,\n]+)""", re.MULTILINE)
_CONFIG_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_CONFIG = 1 << 20  # bytes


def words_of(words: Sequence[str], phase: str) -> list[str]:
    """The words of the command in a phase."""
    return [word.replace("{phase}", phase) for word in words]


def check_apart(calibration: Sequence[str], training: Sequence[str]) -> None:
    """ValueError where both commands name the same output folder, on the command line or else in a file that they
    read. Not every program says it there: what cannot be seen passes."""
    folder = _output_dir(calibration)
    if folder is not None and folder == _output_dir(training):
        raise ValueError(
            f"calibration and training would both write to {folder}, where one could resume from the other's "
            f"checkpoints. Write {{phase}}, which becomes {CALIBRATION} or {TRAINING}, into the command: "
            f"--output_dir {folder}/{{phase}} (for llamafactory-cli output_dir={folder}/{{phase}}), or take two "
            "configuration files, such as run-{phase}.yaml"
        )


def left_checkpoints(output_dir: str) -> bool:
    """Whether calibration, whose Trainer wrote to `output_dir`, left checkpoints where training may find them."""
    is_apart = CALIBRATION in output_dir or not output_dir
    return not is_apart and any(path.is_dir() for path in Path(output_dir).glob("checkpoint-*"))


def _output_dir(words: Sequence[str]) -> str | None:
    """The folder that a command names last, else the last one in its configuration files."""
    named = None
    for place, word in enumerate(words):
        match = _OPTION.fullmatch(word)
        if match is not None and match[1] is not None:
            named = match[1]
        elif match is not None and word.startswith("--") and place + 1 < len(words):
            named = words[place + 1]
    if named is not None:
        return named
    found = [folder for word in words for folder in _IN_FILE.findall(_config_text(word))]
    return found[-1].strip() if found else None


def _config_text(word: str) -> str:
    path = Path(word)
    if path.suffix not in _CONFIG_SUFFIXES or not path.is_file() or path.stat().st_size > _LARGEST_CONFIG:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")

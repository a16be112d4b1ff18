"""A bash shell with argcomplete offers commands, options, and the values of options, without importing torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REGISTER = Path(sys.executable).with_name("register-python-argcomplete")
# What bash does when Tab is pressed: it sets COMP_* and calls the function that `complete -F` names.
PRESS_TAB = """
eval "$({register} lota)"
COMP_LINE="$1"; COMP_POINT=${{#1}}; COMP_TYPE=9
read -ra COMP_WORDS <<< "$1"; [[ "$1" == *" " ]] && COMP_WORDS+=("")
COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
_python_argcomplete lota "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """PATH begins with a `lota` that runs this checkout and in which importing torch fails."""
    code = 'import sys; sys.modules["torch"] = None; from lota.cli import main; main()'
    script = tmp_path / "lota"
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(shutil.which("bash") is None or not REGISTER.exists(), reason="needs bash and argcomplete")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lota tr", {"train", "trim"}),
        ("lota train --den", {"--density", "--dense"}),
        ("lota apply --", {"--help", "--quiet", "--base", "--revision", "--dtype", "--trust-remote-code", "--out"}),
        ("lota train --score gr", {"gradient"}),
        ("lota train --merged ", {"true", "false"}),
        ("lota evaluate --metrics ", {"loss", "exact", "number", "rouge"}),
        ("lota export ticket --format ", {"hf", "peft"}),
        ("lota config llama31_8b_s", {"llama31_8b_safety", "llama31_8b_samsum", "llama31_8b_sql"}),
    ],
)
def test_bash_offers(line: str, offered: set[str], environment: dict[str, str]) -> None:
    command = ["bash", "-c", PRESS_TAB.format(register=REGISTER), "bash", line]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert {word.strip() for word in done.stdout.splitlines()} == offered, done.stderr

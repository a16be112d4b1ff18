"""`import lota` loads neither torch nor DeepSpeed, and gives every public name and submodule at its first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lota

SUBMODULES = ["delivery", "kernels", "optim", "plan", "selection", "ticket"]


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_lota_is_light():
    assert _run("import lota, sys; print('torch' in sys.modules, 'deepspeed' in sys.modules)") == "False False\n"


def test_the_optimizer_as_its_docstring_names_it():
    assert _run("import lota; print(lota.optim.MaskedAdamW.__module__)") == "lota.optim\n"


def test_every_public_name_in_a_fresh_process():
    code = f"import lota\nnames = {{*lota.__all__, *{SUBMODULES}}}\nfor name in names: getattr(lota, name)\n"
    assert _run(code + "print(names <= set(dir(lota)))").endswith("True\n")


def test_other_names_are_no_attributes():
    with pytest.raises(AttributeError, match="module 'lota' has no attribute 'optimizer'"):
        lota.optimizer  # noqa: B018

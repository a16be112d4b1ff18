"""All kernel tests pass on Triton's interpreter, in a process of its own: Triton reads its flag when it is imported.

Without a GPU and the interpreter they are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed on this platform")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
def test_kernels_under_the_interpreter(tmp_path):
    names = ("ops", "step_is_exact", "rounding", "launch_shapes")
    files = [f"tests/kernels/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "triton", *files, "-p", "no:cacheprovider"]
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, f"--basetemp={tmp_path / 'child'}"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 150 and "skipped" not in run.stdout, run.stdout[-500:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
def test_without_a_gpu_its_tests_are_skipped_with_a_reason():
    """What `make test-gpu` says on such a machine: no error, and no silent success."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider"]
    files = ["tests/kernels/test_ops.py", "tests/kernels/test_gpu.py"]
    run = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "torch sees no GPU" in run.stdout and re.search(r"^\d+ skipped, \d+ deselected", run.stdout, re.MULTILINE)

"""Stages `kernels` and `memory-checker`: the tests that need the device, those most likely to find something first.

Where a test takes the whole process or the device with it, the rest runs in a new process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import pytest_rows
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.environment import ROOT, missing

_SLACK = 4.0  # seconds before the stage's limit at which pytest is ended
_MOST_PROCESSES = 6


def run(bench: Bench) -> None:
    run_lists(bench, bench.sizes.tests)


def run_checker(bench: Bench) -> None:
    if bench.device.kind == "cuda" and shutil.which("compute-sanitizer") is None:
        bench.leave_out("memory checker", "compute-sanitizer is not installed")
        return
    marker, test = ("gpu", "memory_checker") if bench.device.kind == "cuda" else ("not gpu", "test_forced_choices")
    run_lists(bench, [("-m", marker, "tests/kernels/test_gpu.py", "tests/kernels/test_backend.py", "-k", test)])


def run_lists(bench: Bench, lists: Sequence[tuple[str, ...]]) -> None:
    """One `pytest ARGUMENTS` after the other; a test that ran is not run again by a later one."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "tests.jsonl")
        rows.touch()
        for arguments in lists:
            before = set(pytest_rows.read(rows))
            started = time.monotonic()
            has_ended = _run_to_end(bench, arguments, rows, Path(folder, "child"))
            tests = {name: row for name, row in pytest_rows.read(rows).items() if name not in before}
            _record(bench, "pytest " + " ".join(arguments), tests, time.monotonic() - started, has_ended)
        passed = sum(row["outcome"] == "passed" for row in pytest_rows.read(rows).values())
    bench.check("tests ran", passed > 0, f"{passed} passed; expected at least one")


def _run_to_end(bench: Bench, arguments: tuple[str, ...], rows: Path, scratch: Path) -> bool:
    """In as many processes as it takes; whether the end of the list was reached."""
    for _ in range(_MOST_PROCESSES):
        before = pytest_rows.read(rows)
        if bench.left() < _SLACK + 2:
            break
        if _one_process(bench, arguments, rows, scratch):
            return True
        if pytest_rows.read(rows) == before:
            break
    return False


def _one_process(bench: Bench, arguments: tuple[str, ...], rows: Path, scratch: Path) -> bool:
    """Whether pytest came to the end of its list."""
    seconds = bench.left() - _SLACK
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "benchmarks.gpu.pytest_rows", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", f"--basetemp={scratch}", *arguments]
    if missing(("deepspeed",)):
        command += ["--deselect", "tests/kernels/test_gpu.py::test_zero3_with_one_process_on_nccl"]
    settings = json.dumps({"file": str(rows), "seconds": seconds})
    try:
        run = subprocess.run(command, cwd=ROOT, env=os.environ | {pytest_rows.VARIABLE: settings}, timeout=seconds + 2)
    except subprocess.TimeoutExpired:
        return False
    return run.returncode in (0, 1, 5)  # all passed, some failed, none were left; 2: stopped before the end


def _record(bench: Bench, what: str, tests: dict[str, dict[str, Any]], took: float, has_ended: bool) -> None:
    counts = Counter(row["outcome"] or "unfinished" for row in tests.values())
    for name, row in tests.items():
        if row["outcome"] == "failed":
            bench.check(name, False, " | ".join(row["text"].splitlines()[-6:]))
        elif row["outcome"] is None:
            how = "it ended pytest's process" if bench.left() > _SLACK else "it was still running at the stage's limit"
            bench.check(name, False, f"no outcome: {how}; see the log")
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "none that had not run"
    bench.note(f"{what}: {told}, {took:.1f} s")
    if counts["passed"]:
        bench.check(what, not counts["failed"] and not counts["unfinished"], told)
    if not has_ended:
        bench.leave_out(f"the rest of {what}", "no time was left, or too many processes were lost")

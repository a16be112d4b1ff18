"""Every stage of `benchmarks.gpu` runs on a CPU with tiny sizes and finds everything right, so that on the one day on
which a GPU is there, its own code is not what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.environment import ROOT, missing
from benchmarks.gpu.kernel_tests import run_lists
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu.sizes import TINY
from benchmarks.gpu.stages import STAGES, Stage

ENVIRONMENT = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
TIMEOUT = 400
QUICK = [stage for stage in STAGES if stage.name != "recipe"]  # whole jobs: a minute, and CI has tests of its own

# What must be among a stage's figures, by how their names begin and end.
FIGURES = {
    "facts": ["B index", "F whole gradient"],
    "reducer": ["C both legs", "C all-to-all only", "C all-reduce only"],
    "step": ["a tiny layer at 10.0%: step, share of the floor", "a tiny layer at 0.1%: of three launches"],
    "1b-dense": ["1B: tokens/s", "1B: peak memory"],
    "1b-sparse-1": ["1B: tokens/s", "1B: hooks and step"],
    "1b-sparse-10": ["1B: tokens/s", "1B: hooks and step"],
    "1b-lora": ["1B: tokens/s"],
    "8b": ["8B planned: dense ZeRO-3", "8B calibration: tokens/s", "8B sparse: tokens/s", "8B sparse: peak memory"],
    "swap": ["swap of 1% on the device", "exchange_, 10% of 1 layer(s), with fingerprints"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return _run_stages(tmp_path_factory.mktemp("gpu") / "rows.jsonl", QUICK)


def _run_stages(path: Path, stages: list[Stage]) -> dict[str, list[dict[str, Any]]]:
    """All stages in one process, which imports DeepSpeed once."""
    common = {"device": "cpu", "sizes": "tiny", "rows": str(path), "until": time.monotonic() + TIMEOUT}
    there = [stage for stage in stages if not missing(stage.packages)]
    specs = [common | {"name": s.name, "function": s.function, "options": s.options} for s in there]
    command = [sys.executable, "-m", "benchmarks.gpu.child", json.dumps(specs)]
    run = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    found = defaultdict(list)
    for row in read_rows(path):
        found[row["stage"]].append(row)
    return found


@pytest.mark.slow
def test_the_recipes_are_right_on_a_cpu(tmp_path: Path) -> None:
    found = _run_stages(tmp_path / "rows.jsonl", [stage for stage in STAGES if stage.name == "recipe"])
    checks = [row for row in found["recipe"] if row["kind"] == "check"]
    assert len(checks) == 6 and all(row["is_right"] for row in checks), checks


@pytest.mark.parametrize("stage", [stage.name for stage in QUICK])
def test_stage_is_right_on_a_cpu(rows: dict[str, list[dict[str, Any]]], stage: str) -> None:
    absent = missing(next(known.packages for known in STAGES if known.name == stage))
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")
    wrong = [row for row in rows[stage] if row["kind"] == "check" and not row["is_right"]]
    assert not wrong
    assert any(row["kind"] == "check" for row in rows[stage]), "a stage that checks nothing cannot be wrong"
    left_out = [row["name"] for row in rows[stage] if row["kind"] == "left out"]
    assert left_out == (["E each rank on its own device in a plain loop"] if stage == "facts" else [])
    names = [row["name"] for row in rows[stage] if row["kind"] == "figure"]
    for beginning in FIGURES.get(stage, []):
        assert any(name.startswith(beginning) for name in names), (beginning, names)


ODD_TESTS = """
import os

def test_passes():
    assert True

def test_fails():
    assert 1 == 2, "one is not two"

def test_ends_the_process():
    os._exit(11)

def test_after_it():
    assert True

def test_loses_the_device():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after_that():
    assert True
"""


def test_tests_that_take_the_process_with_them(tmp_path: Path) -> None:
    """Each is named, and the rest runs in a new process, once."""
    (tmp_path / "test_odd.py").write_text(ODD_TESTS, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    bench = Bench("kernels", Cpu(), TINY, {}, rows, time.monotonic() + 100)
    run_lists(bench, [(str(tmp_path / "test_odd.py"), "-k", "passes"), (str(tmp_path / "test_odd.py"),)])
    wrong = {row["name"].split("::")[-1]: row["detail"] for row in read_rows(rows) if not row.get("is_right", True)}
    assert list(wrong)[:3] == ["test_fails", "test_ends_the_process", "test_loses_the_device"]
    assert "one is not two" in wrong["test_fails"]
    assert "it ended pytest's process" in wrong["test_ends_the_process"]
    notes = [row["text"].partition("test_odd.py")[2] for row in read_rows(rows) if row["kind"] == "note"]
    assert notes[0].startswith(" -k passes: 1 passed, ")
    assert notes[1].startswith(": 2 failed, 2 passed, 1 unfinished, "), "what passed before is not run again"


def test_sparse_tokens_have_denses_as_their_aim(rows: dict[str, list[dict[str, Any]]]) -> None:
    dense, sparse = (
        next(row for row in rows[stage] if row.get("name") == "1B: tokens/s") for stage in ("1b-dense", "1b-sparse-1")
    )
    assert sparse["at_least"] == dense["value"]
    assert "at_least" not in dense


def test_the_command_itself(tmp_path: Path) -> None:
    """As on a GPU machine: plain `python -m`, some stages, a table as text and as JSON."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--stages", "step"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "report.json", "report.txt", "rows.jsonl"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["status"] == 0 and report["asked"]["sizes"] == "tiny"
    assert report["machine"]["hardware"] and report["versions"]["torch"] and report["source"]["source_sha256"]
    assert [(stage["name"], stage["state"]) for stage in report["stages"]] == [("step", "right")]
    text = (tmp_path / "report.txt").read_text(encoding="utf-8")
    assert text in run.stdout and "share of the floor" in text and "aim: at least 0.8" in text

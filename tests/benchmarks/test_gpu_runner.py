"""`benchmarks.gpu` keeps its minutes and loses nothing: stages that fail, hang, die or cannot run are recorded and
passed over, whatever they started ends with them, and a signal still leaves the table of what ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.environment import ROOT
from benchmarks.gpu.report import Report, missing_lines
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu.runner import RESERVE, Result, Runner
from benchmarks.gpu.stages import STAGES, Stage, chosen, time_for


def _stage(name: str, seconds: float = 60, packages: tuple[str, ...] = ("torch",)) -> Stage:
    return Stage(name, f"tells {name}", f"tests.benchmarks.odd_stages:{name}", seconds, 1, packages)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Result], Report, Path]:
    """One run of every odd stage; the time of the last one is over before it begins."""
    folder = tmp_path_factory.mktemp("odd")
    report = Report(folder, {"versions": {"torch": "some"}})
    runner = Runner("cpu", "tiny", folder, time.monotonic() + 1000)
    stages = [_stage(name) for name in ("right", "wrong", "raises", "killed", "silent", "parts")]
    runner.run([*stages, _stage("absent", packages=("torch", "no-such-package"))], report.add)
    # long enough to import torch, however busy the machine is
    report.add(runner.run_one(_stage("hangs"), 2 + 3 * report.results[0].seconds))
    runner.deadline = time.monotonic() + RESERVE
    runner.run([_stage("late")], report.add)
    return {result.stage.name: result for result in report.results}, report, folder


def test_what_becomes_of_stages(results: tuple[dict[str, Result], Report, Path]) -> None:
    found, report, folder = results
    states = {name: result.state for name, result in found.items()}
    assert states == {
        "right": "right",
        "wrong": "wrong",
        "raises": "failed",
        "killed": "failed",
        "silent": "failed",
        "parts": "wrong",
        "absent": "cannot run",
        "hangs": "over its limit",
        "late": "left out",
    }
    assert found["wrong"].why == "1 of its checks: a false statement"
    assert "expected a GPU, got a toaster" in found["raises"].why
    assert [row["kind"] for row in found["raises"].rows] == ["figure", "check", "traceback"], "what came before is kept"
    assert any("got a toaster" in line for line in found["raises"].tail)
    assert found["killed"].why == "ended by SIGKILL"
    assert found["silent"].why == "it ended without a result"
    assert found["absent"].why == "not installed: no-such-package"
    assert report.status == 1
    stages = json.loads((folder / "report.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["state"] for stage in stages] == list(states.values())


def test_parts_are_passed_over(results: tuple[dict[str, Result], Report, Path]) -> None:
    rows = {row["name"]: row for row in results[0]["parts"].rows if row["kind"] != "traceback"}
    assert not rows["a part that fails"]["is_right"] and "results differ" in rows["a part that fails"]["detail"]
    assert rows["a part for which there is no time"]["kind"] == "left out"
    assert rows["it was reached"]["is_right"]


def test_a_stage_that_hangs_ends_with_all_it_started(results: tuple[dict[str, Result], Report, Path]) -> None:
    result = results[0]["hangs"]
    assert result.seconds < result.limit + RESERVE
    assert any("odd_stages.py" in line and "hangs" in line for line in result.tail), "the log shows where it was"
    (note,) = result.rows
    assert not _is_alive(int(note["text"].split()[1]))


def test_the_table(results: tuple[dict[str, Result], Report, Path]) -> None:
    text = (results[2] / "report.txt").read_text(encoding="utf-8")
    for line in (
        "WRONG a false statement: expected true, got false",
        "aim: at most 5, reached",
        "aim: at least 5, NOT REACHED",
        "left out: a part for which there is no time",
        "of 2 aims 1 are reached",
        "not installed: no-such-package",
        "versions: torch some",
    ):
        assert line in text, line


def test_only_right_stages_give_status_0(tmp_path: Path) -> None:
    report = Report(tmp_path, {})
    assert report.status == 1, "nothing ran"
    report.add(Result(_stage("late"), "left out", "no time"))
    assert report.status == 1
    report.add(Result(_stage("right"), "right"))
    assert report.status == 0
    report.add(Result(_stage("hangs"), "over its limit"))
    assert report.status == 1


def test_a_signal_leaves_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--minutes", "5", "--out", str(tmp_path)]
    process = subprocess.Popen([*command, "--stages", "facts,swap"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(row["stage"] == "facts" for row in read_rows(tmp_path / "rows.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    stages = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [("facts", "stopped"), ("swap", "left out")]
    assert stages[0]["rows"], "what it had found by then"
    assert "left out: the command was stopped by SIGTERM" in output


def test_time_is_shared() -> None:
    first, second, third = (_stage(name, seconds=30) for name in ("right", "wrong", "parts"))
    assert time_for(first, [second, third], 90) == 30
    assert time_for(first, [second, third], 100) == 40, "what the later ones do not want"
    assert time_for(first, [second, third], 1000) == 90, "not all of it: a hang shall not eat everything"
    assert time_for(second, [third], 20) == 20, "shortened before the later ones get anything"
    assert time_for(third, [], 0.5) is None


def test_stages_are_chosen_by_name() -> None:
    assert chosen(None) == list(STAGES)
    assert [stage.name for stage in chosen(["step", "kernels"])] == ["kernels", "step"], "in order of worth"
    with pytest.raises(ValueError, match=r"expected stages among kernels, .*, got stepp"):
        chosen(["stepp"])


def test_missing_packages_are_named_with_their_stages() -> None:
    stages = [_stage("right"), _stage("wrong"), _stage("parts")]
    lines = missing_lines(stages, {"right": [], "wrong": ["deepspeed"], "parts": ["deepspeed", "peft"]})
    assert lines == [
        "missing: deepspeed; without it these stages cannot run: wrong, parts",
        "missing: peft; without it these stages cannot run: parts",
    ]


def test_the_command_does_without_torch_itself() -> None:
    """Else it could not say that torch is missing."""
    code = "import sys, benchmarks.gpu.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--minutes", "2", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "failed: ValueError: --device cuda needs a GPU, and torch sees none; --device cpu runs" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--stages", "steps"], "expected stages among"), (["--minutes", "0"], "expected minutes above 0")],
)
def test_wrong_arguments(arguments: list[str], told: str) -> None:
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and told in run.stderr


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"

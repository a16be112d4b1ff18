"""Runs stages one after the other, each in a process group of its own that ends at the stage's limit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.environment import ROOT, missing
from benchmarks.gpu.rows import read_rows
from benchmarks.gpu.stages import Stage, time_for

GRACE = 1.5
"""Seconds beyond its limit in which a stage may end by itself; as many to end by SIGTERM."""
RESERVE = 3 * GRACE + 1.5  # for ending the last stage by force, and for the table
TAIL_LINES = 25


class Stopped(BaseException):
    """A signal asked this command to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Result:
    """state: right, wrong, failed, over its limit, stopped, left out or cannot run. why: in words, where it is not
    right. shortened: the stage got less time than it wants. tail: the log's last lines of a stage that failed."""

    stage: Stage
    state: str
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    shortened: bool = False
    tail: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ran(self) -> bool:
        return self.state not in ("left out", "cannot run")


class Runner:
    """device, sizes: names of both. folder: of rows.jsonl and log.txt. deadline: of `time.monotonic()`."""

    def __init__(self, device: str, sizes: str, folder: Path, deadline: float) -> None:
        self.device, self.sizes, self.deadline = device, sizes, deadline
        self.rows, self.log = folder / "rows.jsonl", folder / "log.txt"
        self.is_stopped: Stopped | None = None

    def left(self) -> float:
        return self.deadline - RESERVE - time.monotonic()

    def run(self, stages: Sequence[Stage], ended: Callable[[Result], None]) -> None:
        """All stages; `ended` is called with each result before the next stage begins."""
        for place, stage in enumerate(stages):
            absent = missing(stage.needs(self.device))
            later = [other for other in stages[place + 1 :] if not missing(other.needs(self.device))]
            limit = time_for(stage, later, self.left())
            if self.is_stopped is not None:
                result = Result(stage, "left out", f"the command was stopped by {self.is_stopped}")
            elif absent:
                result = Result(stage, "cannot run", f"not installed: {', '.join(absent)}")
            elif limit is None:
                why = f"{max(0.0, self.left()):.0f} s were left, it takes at least {stage.least:.0f}"
                result = Result(stage, "left out", why)
            else:
                result = self.run_one(stage, limit)
            ended(result)

    def run_one(self, stage: Stage, limit: float) -> Result:
        """Start the stage's process and wait for it; whatever it started ends with it."""
        before, log_start, started = len(read_rows(self.rows)), self._log_size(), time.monotonic()
        spec = {"name": stage.name, "function": stage.function, "options": stage.options, "device": self.device}
        spec |= {"sizes": self.sizes, "rows": str(self.rows), "until": started + limit}  # one clock for all processes
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n=== {stage.name}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "benchmarks.gpu.child", json.dumps([spec])],
                cwd=ROOT,
                env=_environment(self.device),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,
            )
            try:
                status = _wait(process, limit + GRACE)
            except Stopped as stopped:
                self.is_stopped, status = stopped, None
            finally:
                _end_group(process)
        result = Result(stage, "right", seconds=time.monotonic() - started, limit=limit)
        result.shortened = limit < stage.seconds
        result.rows = read_rows(self.rows)[before:]
        result.state, result.why = self._judge(status, result)
        if result.state in ("failed", "over its limit", "stopped"):
            result.tail = self._log_tail(log_start)
        if not result.why and result.state == "failed":  # it failed before it could write a row
            result.why = next((line for line in reversed(result.tail) if line.strip()), "")
        return result

    def _judge(self, status: int | None, result: Result) -> tuple[str, str]:
        wrong = [row["name"] for row in result.rows if row["kind"] == "check" and not row["is_right"]]
        if self.is_stopped is not None:
            return "stopped", f"by {self.is_stopped}"
        if status is None or (status != 0 and result.seconds >= result.limit):
            return "over its limit", f"of {result.limit:.0f} s; the log shows where it was"
        if status < 0:
            return "failed", f"ended by {signal.Signals(-status).name}"
        if status != 0:
            return "failed", next((str(row["detail"]) for row in result.rows if row.get("name") == "the stage"), "")
        if wrong:
            return "wrong", f"{len(wrong)} of its checks: " + ", ".join(wrong[:4])
        if not result.rows:
            return "failed", "it ended without a result"
        return "right", ""

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _log_tail(self, start: int) -> list[str]:
        with self.log.open("rb") as log:
            log.seek(max(start, self._log_size() - (1 << 14)))
            return log.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]


def _environment(device: str) -> dict[str, str]:
    """One rank that no launcher started, this checkout first, nothing from the network."""
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONFAULTHANDLER": "1"}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _wait(process: subprocess.Popen[Any], seconds: float) -> int | None:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end_group(process: subprocess.Popen[Any]) -> None:
    """SIGTERM, then SIGKILL, to all that the stage started. A process that hangs in the driver is left behind."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        _wait(process, GRACE)
    _signal_group(process, signal.SIGKILL)
    _wait(process, GRACE)


def _signal_group(process: subprocess.Popen[Any], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)

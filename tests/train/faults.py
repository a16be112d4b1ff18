"""A recipe's job on two ranks under any launcher, one rank of which is killed while the others are watched."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.train.test_end_to_end import ROOT, command_of

LAUNCHERS = ("deepspeed", "torchrun", "nobody")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Job:
    """Started; `log` gets what all of it prints."""

    processes: list[subprocess.Popen[bytes]]
    log: Path

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def says_that_ended(self, rank: int) -> bool:
        """Whether a line tells of the rank and of the way to go on, and no traceback of its consequences."""
        line = rf"\[lota\] rank {rank} \(process \d+ on \S+\) ended without an error.*--resume_from_checkpoint true"
        return re.search(line, self.text()) is not None and "Traceback" not in self.text()

    def is_over(self) -> bool:
        return all(process.poll() is not None for process in self.processes)

    def rank(self, number: int) -> psutil.Process | None:
        """The process of a rank, once there is one."""
        for process in self.processes:
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for member in family:
                try:
                    words = member.cmdline()
                    is_recipe = len(words) > 2 and any(word.startswith("recipes/") for word in words[1:4])
                    if is_recipe and member.environ().get("RANK") == str(number):
                        return member
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
        return None

    def wait(self, seconds: float) -> float:
        """How long the job took to end; AssertionError, and nothing left running, where that is longer."""
        started = time.monotonic()
        while not self.is_over():
            if time.monotonic() - started > seconds:
                self.end()
                raise AssertionError(f"still running after {seconds:.0f} s: {self.text()[-4000:]}")
            time.sleep(0.05)
        return time.monotonic() - started

    def end(self) -> None:
        """Kill whatever still runs of it."""
        for process in self.processes:
            if process.poll() is None:
                for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                    member.kill()
                process.wait()


def start(launcher: str, world: Path, output: Path, *options: str, log: Path | None = None) -> Job:
    """The main job on two ranks: under DeepSpeed's launcher, torchrun, or two processes that nobody watches.

    log: a file of its own, beside `output` unless given.
    """
    script = "train_lota.py"
    command = command_of(script, world, output, *options)
    words = command[command.index(f"recipes/{script}") :]
    port = command[command.index("--master_port") + 1]
    log = log or _free_name(output)
    if launcher == "deepspeed":
        commands = [(command, {})]
    elif launcher == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        commands = [([*torchrun, *words], {})]
    else:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        commands = [([sys.executable, *words], {**shared, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    with open(log, "ab") as file:
        processes = [
            subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT | own, stdout=file, stderr=subprocess.STDOUT)
            for words, own in commands
        ]
    return Job(processes, log)


def _free_name(output: Path) -> Path:
    return next(path for n in range(1000) if not (path := output.with_name(f"{output.name}-{n}.log")).exists())


def kill_rank(job: Job, number: int, moment: Callable[[], bool], patience: float = 300.0) -> float | None:
    """Send SIGKILL to a rank at a moment; the seconds that the job then took to end, None where it was over before."""
    deadline = time.monotonic() + patience
    victim: psutil.Process | None = None
    while victim is None:
        if job.is_over():
            return None
        if time.monotonic() > deadline:
            job.end()
            raise AssertionError(f"the moment did not come: {job.text()[-4000:]}")
        victim = job.rank(number) if moment() else None
        time.sleep(0.002)
    with suppress(psutil.NoSuchProcess):
        victim.send_signal(signal.SIGKILL)
    return job.wait(60.0)

"""A rank that dies or fails alone ends all of them soon, whoever started them, with one line that says so, and nothing
is left in shared memory."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.train.faults import ENVIRONMENT
from tests.train.test_end_to_end import ROOT

SCRIPT = """
import os, sys, time
import torch, torch.distributed as dist
from lota.ranks.world import join_world
from lota.ranks.process import run_job, watch_ranks

def main():
    join_world()
    watch_ranks()
    if dist.get_rank() == int(sys.argv[1]):
        {what}
    if sys.argv[2] == "computes":
        time.sleep(100)
    dist.all_reduce(torch.ones(1))

run_job(main, advice=" Do this.")
"""


def run_script(what: str, failing: int, others: str) -> list[tuple[int, str]]:
    """Three ranks that nobody watches; exit status and output of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        shared["LOCAL_SIZE"] = "3"  # DeepSpeed's launcher says so; it makes shared buffers then
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT.format(what=what), str(failing), others], cwd=ROOT,
            env=ENVIRONMENT | shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in "012"
    ]  # fmt: skip
    results = [(p.wait(timeout=120), p.stdout.read() if p.stdout else "") for p in processes]
    assert not list(Path("/dev/shm").glob(f"*_{shared['MASTER_PORT']}_*"))
    return results


@pytest.mark.parametrize(
    ("what", "failing", "others", "status", "line"),
    [
        ("raise ValueError('wrong here')", 2, "waits", 2, r"failed: wrong here. This job ends. Do this."),
        ("raise KeyError('gone')", 1, "computes", 1, "failed: KeyError: 'gone'. This job ends. Do this."),
        ("os.kill(os.getpid(), 9)", 0, "waits", -9, "ended without an error message"),
    ],
)
def test_one_rank_alone(what: str, failing: int, others: str, status: int, line: str) -> None:
    """Whether the others wait for it in a collective or compute: they end, and one of them says why, once."""
    started = time.monotonic()
    results = run_script(what, failing, others)
    assert time.monotonic() - started < 90
    assert results[failing][0] == status
    assert all(code != 0 for code, _ in results)
    speaker = 1 if failing == 0 else 0
    assert f"[lota] rank {failing} (process " in results[speaker][1] and line in results[speaker][1]
    assert sum(output.count("[lota]") for _, output in results) == 1, results
    assert ("Traceback" in results[failing][1]) == ("KeyError" in what)
    assert not any("Traceback" in output for rank, (_, output) in enumerate(results) if rank != failing)


def test_all_ranks_alike_say_it_once() -> None:
    results = run_script("pass\n    raise ValueError('density must be less')", 0, "waits")
    assert [code for code, _ in results] == [2, 2, 2]
    assert sum(output.count("[lota] density must be less\n") for _, output in results) == 1
    assert sum(output.count("[lota]") for _, output in results) == 1, results

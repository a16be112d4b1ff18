"""Stages that misbehave, for the tests of the command that runs stages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu.bench import Bench


def right(bench: Bench) -> None:
    bench.check("one and one", 1 + 1 == 2, "two")
    bench.figure("quickness", 3.0, "ms", at_most=5.0)
    bench.figure("slowness", 3.0, "ms", at_least=5.0)


def wrong(bench: Bench) -> None:
    bench.check("a false statement", False, "expected true, got false")


def raises(bench: Bench) -> None:
    bench.figure("before the error", 1.0, "")
    raise ValueError("expected a GPU, got a toaster")


def hangs(bench: Bench) -> None:
    """With a child of its own, which ignores SIGTERM and whose id is in the rows."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", code])
    bench.note(f"child {child.pid}")
    time.sleep(600)


def killed(bench: Bench) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def silent(bench: Bench) -> None:
    """Finds nothing, which is no result."""


def parts(bench: Bench) -> None:
    def fails() -> None:
        raise SystemExit("results differ")

    bench.attempt("a part that fails", fails, seconds=0)
    bench.attempt("a part for which there is no time", fails, seconds=1e6)
    bench.attempt("the last part", lambda: bench.check("it was reached", True), seconds=0)

"""Starts a command as one phase, waits for it, and decides by the reports of its ranks whether there is an outcome.

The mask or the ticket takes its name when the command has ended well, by one rename: a command that fails, is killed or
never trains leaves nothing at that name, and what an earlier run left there is no outcome of this one.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lota.files import check_free, sync_path
from lota.wrap import reports
from lota.wrap.apart import words_of
from lota.wrap.order import PHASE_VARIABLE, RESULT, VARIABLE, Order
from lota.wrap.reports import Report

NOTHING_BUILT = 3
"""Exit status where the command ended well, but trained nothing that lota could see."""
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PATIENCE_SECONDS = 70.0  # NFS may show for a minute what a folder held before
_SITE = Path(__file__).resolve().parent / "site"


def launch(
    words: Sequence[str],
    phase: str,
    out: Path,
    *,
    options: Mapping[str, Any],
    save: Mapping[str, Any] | None = None,
    num_steps: int | None = None,
) -> tuple[int, list[Report]]:
    """Run the command as `phase`; the exit status to end with, and the reports of its ranks.

    words: with `{phase}` where the phase's name goes. out: the mask or the ticket; ValueError where something is there.
    With several launchers of one job, one a host, that of rank 0's host writes it.
    """
    out = Path(os.path.abspath(out))
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.run-{secrets.token_hex(8)}")
    words = words_of(words, phase)
    order = Order(phase, str(folder), options, save or {}, num_steps, tuple(words))
    folder.mkdir()
    try:
        status = _run(words, environment(order))
        seen = reports.read_all(folder)
        status = _decide(status, seen, order, out)
    finally:
        if not (folder / RESULT).exists():
            shutil.rmtree(folder, ignore_errors=True)
    return status, seen


def environment(order: Order) -> dict[str, str]:
    """Of the command: this process's, with what its ranks must know, and the folder that wakes them."""
    path = os.pathsep.join(filter(None, (str(_SITE), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, VARIABLE: order.encode(), PHASE_VARIABLE: order.phase}


def wait_for(path: Path) -> bool:
    """Whether a folder that the launcher of another host writes is there, or soon."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.is_dir() and time.monotonic() < deadline:
        time.sleep(0.5)
    return path.is_dir()


def _run(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """The status of the command, 128 + N where signal N ended it."""
    try:
        process = subprocess.Popen(words, env=environment)
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"the command cannot be started: {error}") from None
    with _passing_on(process):
        status = process.wait()
    return 128 - status if status < 0 else status


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """What asks the launcher to stop asks the command, which ends in its own way. Ctrl-C comes to both."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    handlers = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    handlers[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _decide(status: int, seen: list[Report], order: Order, out: Path) -> int:
    """Give the outcome its name if there is one, and say what happened if there is none; the exit status."""
    result = Path(order.folder) / RESULT
    problem = _problem(status, seen, order)
    if problem is None and result.is_dir():
        check_free(out)
        os.replace(result, out)
        sync_path(out.parent)
        first = seen[0]
        print(f"[lota] {out}: {order.outcome} of {first.steps} steps on {first.world_size} ranks", flush=True)
        return 0
    if problem is None and seen[0].rank > 0:
        places = f"{seen[0].rank}" if len(seen) == 1 else f"{seen[0].rank} to {seen[-1].rank}"
        print(f"[lota] ranks {places} finished; the {order.outcome} is written on the host of rank 0", flush=True)
        return 0
    lines = [f"{problem or 'the ranks finished, but what they wrote is not there'}. No {order.outcome} was written"]
    lines += [f"{report}: {report.reason}" for report in _failed(seen)[:3]]
    if result.is_dir():
        lines.append(
            f"the block was finished before that. What it wrote is kept in {result}, to be looked at; it is not "
            f"taken for the {order.outcome} of a run that failed"
        )
    for line in lines:
        print(f"[lota] {line}", file=sys.stderr, flush=True)
    return status or (1 if seen else NOTHING_BUILT)


def _failed(seen: list[Report]) -> list[Report]:
    """One for each reason, the first of its ranks."""
    return list({report.reason: report for report in reversed(seen) if report.state == reports.FAILED}.values())[::-1]


def _problem(status: int, seen: list[Report], order: Order) -> str | None:
    command = " ".join(order.command)
    command = command if len(command) <= 60 else command[:57] + "..."
    if status > 128:
        return f"`{command}` was ended by signal {status - 128}"
    if status:
        return f"`{command}` ended with status {status}"
    if any(report.state == reports.FAILED for report in seen):
        return f"`{command}` ended with 0, but not all of its ranks trained to the end"
    if not seen:
        return (
            f"`{command}` ended with 0, but no DeepSpeed engine that trains was built in it. Give it a ZeRO-3 "
            "configuration (docs/programs.md); engines without an optimizer, `python -I` and `-E`, and hosts that do "
            "not get this environment do not count"
        )
    if any(report.state == reports.BUILT for report in seen):
        gone = next(report for report in seen if report.state == reports.BUILT)
        return f"`{command}` ended with 0, but {gone} did not finish its block (killed, or os._exit)"
    return None

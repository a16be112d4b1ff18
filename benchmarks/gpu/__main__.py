"""Everything that a few minutes on one GPU can tell about this checkout, worth most first.

    python3 -m benchmarks.gpu --minutes 8 --out DIR               # on a machine with a GPU, in the checkout
    python3 -m benchmarks.gpu --stages kernels,step --minutes 4   # some of it
    python3 -m benchmarks.gpu --device cpu --out DIR              # the same code with tiny sizes, as CI runs it

Needs torch, triton and this checkout, and for some stages DeepSpeed, transformers, peft or pytest (see --list); no
network. Every stage is a process of its own with a limit of its own. What it found is written before the next begins,
and one that fails or hangs is recorded and passed over. --minutes is kept: later stages are shortened or left out.

DIR then holds report.txt (the table), report.json (the same, with everything), rows.jsonl (each finding as it came) and
log.txt (all output). Exit status 0 means that every stage that ran was right; a figure short of its aim is no error.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import environment
from benchmarks.gpu.report import Report, line, missing_lines
from benchmarks.gpu.runner import Result, Runner, Stopped
from benchmarks.gpu.stages import STAGES, Stage, chosen

PROBE = Stage("machine", "which device this is", "benchmarks.gpu.environment:probe", 60, 5)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    options = _parser().parse_args(argv)
    if options.list:
        _show_stages()
        return 0
    options.sizes = options.sizes or ("full" if options.device == "cuda" else "tiny")
    try:
        stages = chosen(options.stages.split(",") if options.stages else None)
    except ValueError as error:
        _parser().error(str(error))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    options.out.mkdir(parents=True, exist_ok=True)
    runner = Runner(options.device, options.sizes, options.out, started + 60 * options.minutes)
    for old in (runner.rows, runner.log):
        old.unlink(missing_ok=True)
    report = Report(options.out, _about(options))
    try:
        return _run(runner, report, stages)
    except Stopped as stopped:
        runner.is_stopped = stopped
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        report.write()
        print(f"\n{report.text()}\nwritten: {options.out}/report.txt, report.json, rows.jsonl, log.txt", flush=True)
    return 128 + runner.is_stopped.number


def _run(runner: Runner, report: Report, stages: list[Stage]) -> int:
    absent = {stage.name: environment.missing(stage.needs(runner.device)) for stage in stages}
    for text in missing_lines(stages, absent):
        print(text, flush=True)
    packages = [package for stage in stages for package in stage.needs(runner.device)]
    for package, names in environment.incomplete(packages).items():
        print(f"incomplete: {package} requires {', '.join(names)}, which this machine lacks", flush=True)

    def ended(result: Result) -> None:
        report.add(result)
        print(line(result), flush=True)

    if environment.missing(PROBE.needs(runner.device)):
        runner.run(stages, ended)  # says of each that it cannot run
        return 1
    probed = runner.run_one(PROBE, min(PROBE.seconds, max(1.0, runner.left())))
    if probed.state != "right":
        report.add(probed)
        print(line(probed), flush=True)
    else:
        found = next(row["found"] for row in probed.rows if row["kind"] == "machine")
        report.machine(found)
        print(", ".join(f"{key} {value}" for key, value in found.items()), flush=True)
        runner.run(stages, ended)
    return 128 + runner.is_stopped.number if runner.is_stopped is not None else report.status


def _about(options: argparse.Namespace) -> dict[str, Any]:
    asked = {key: getattr(options, key) for key in ("device", "sizes", "minutes", "stages")}
    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"asked": asked, "at": at, "versions": environment.versions(), "source": environment.source()}


def _show_stages() -> None:
    print("stages in order of worth: wanted seconds, packages")
    for stage in STAGES:
        print(f"  {stage.name:<15}{stage.seconds:>4.0f} s  {stage.tells} [{', '.join(stage.packages)}]")


def _stop(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="for everything together (8)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu"), help="folder to write into (%(default)s)")
    parser.add_argument("--stages", default="", help="some of them, as a,b (all; see --list)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cuda, or cpu to try the code")
    parser.add_argument("--sizes", choices=("full", "tiny"), help="full on cuda, tiny on cpu, unless given")
    parser.add_argument("--list", action="store_true", help="show the stages and stop")
    return parser


def _minutes(text: str) -> float:
    minutes = float(text)
    if not (math.isfinite(minutes) and minutes > 0):
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text}")
    return minutes


if __name__ == "__main__":
    sys.exit(main())

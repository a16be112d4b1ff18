"""Kill one rank of a job again and again, at random moments, under every launcher; resume after each; compare tickets.

    make soak                             20 kills
    make soak SOAK_KILLS=5 SOAK_SEED=7    fewer, and the same moments again (as far as a machine repeats itself)

A moment is a random time in the job's life or a random save, mask, ticket or summary while it is written. Every kill
must end the job within a minute with a status that is not 0 and a line that says why; every run must end in the bytes
of the uninterrupted one. Exits with 1 where that is not so.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lota.demo import base
from lota.demo.small_model import SmallModelConfig
from lota.demo.world import WorldConfig
from tests.train.faults import LAUNCHERS, Job, kill_rank, start

KILLS_A_RUN = 5
OPTIONS = (
    *("--max_steps", "24", "--calibration_steps", "12", "--save_strategy", "steps", "--save_steps", "4"),
    *("--save_total_limit", "2", "--logging_steps", "1", "--merged", "false"),
)
FILES = ("ticket/ticket.safetensors", "ticket/ticket.json", "mask/ticket.safetensors")
LINES = ("ended without an error message", "exits with return code", "exitcode  : -9")


@dataclass
class Kill:
    launcher: str
    rank: int
    moment: str
    seconds: float
    line: str


def main() -> None:
    num_kills, seed = int(os.environ.get("SOAK_KILLS", "20")), int(os.environ.get("SOAK_SEED", time.time_ns() % 10**6))
    print(f"{num_kills} kills, SOAK_SEED={seed}", flush=True)
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="lota-soak-") as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        texts = WorldConfig(num_sentences=300, num_translations=200, num_train=64, num_test=16)
        sizes = SmallModelConfig(vocab_size=320, hidden_size=64, num_layers=2, steps=3, batch_rows=8)
        world = base.prepare(texts, sizes, lambda _: None)
        began = time.monotonic()
        finish(start("deepspeed", world, folder / "straight", *OPTIONS))
        life = time.monotonic() - began
        print(f"an uninterrupted run takes {life:.0f} s", flush=True)
        kills: list[Kill] = []
        num_runs = 0
        while len(kills) < num_kills:
            run = folder / f"run{num_runs}"
            num_runs += 1
            kills += abuse(world, run, life, min(KILLS_A_RUN, num_kills - len(kills)), dice, len(kills))
            for file in FILES:
                if (run / file).read_bytes() != (folder / "straight" / file).read_bytes():
                    sys.exit(f"{file} of a run that was killed differs from the uninterrupted run's; SOAK_SEED={seed}")
            print(f"run {num_runs}: mask and ticket equal the uninterrupted run's", flush=True)
    slowest = max(kills, key=lambda kill: kill.seconds)
    own = sum(kill.line == LINES[0] for kill in kills)
    print(
        f"{len(kills)} kills in {num_runs} runs: every job ended by itself, after {slowest.seconds:.1f} s at most, "
        f"{own} with our own line, the others with their launcher's; all tickets are equal"
    )


def abuse(world: Path, run: Path, life: float, num_kills: int, dice: random.Random, number: int) -> list[Kill]:
    """Start a run, kill it so many times, and let it come to its end. Fewer kills where it came to its end before."""
    kills: list[Kill] = []
    while len(kills) < num_kills:
        launcher = LAUNCHERS[(number + len(kills)) % len(LAUNCHERS)]
        rank = dice.randrange(2)
        job = start(launcher, world, run, *OPTIONS, "--resume_from_checkpoint", "true")
        moment, seen = random_moment(job, run, launcher, life, dice), [""]

        def when(moment: Callable[[], bool] = moment, seen: list[str] = seen) -> bool:
            if not moment():
                return False
            seen[0] = where_it_is(run)
            return True

        seconds = kill_rank(job, rank, when)
        if seconds is None:
            finish(job)
        if (run / "summary.json").exists():
            return kills  # it was done before
        line = next((line for line in LINES if line in job.text()), "")
        status = [process.returncode for process in job.processes]
        kills.append(Kill(launcher, rank, seen[0], seconds, line))
        print(f"{launcher}, rank {rank}, {seen[0]}: ended after {seconds:.1f} s, {status}, '{line}'", flush=True)
        if not line or 0 in status:
            sys.exit(f"expected a status that is not 0 and a line that says why, got:\n{job.text()[-6000:]}")
    finish(start("deepspeed", world, run, *OPTIONS, "--resume_from_checkpoint", "true"))
    return kills


def random_moment(job: Job, run: Path, launcher: str, life: float, dice: random.Random) -> Callable[[], bool]:
    """True from the moment on. Ranks that nobody watches are not killed before they have met: nobody could know."""
    after = time.monotonic() + dice.uniform(0, 0.8 * life)
    in_save, chance = dice.random() < 0.5, dice.uniform(0.05, 0.5)
    last: set[Path] = set()

    def is_there() -> bool:
        nonlocal last
        if launcher == "nobody" and "[lota] plan" not in job.text():
            return False
        if not in_save:
            return time.monotonic() > after
        now = set(unfinished(run))
        new, last = now - last, now
        return bool(new) and dice.random() < chance

    return is_there


def unfinished(run: Path) -> list[Path]:
    """What is being written."""
    found: list[Path] = []
    for place in (run, run / "calibration"):
        if place.is_dir():
            found += [*place.glob(".*.partial"), *place.glob(".*.tmp-*"), *place.glob(".*.partial/*")]
    return found


def where_it_is(run: Path) -> str:
    """What the job does, as far as its files tell."""
    being_written = sorted(str(path.relative_to(run)) for path in unfinished(run))
    if being_written:
        return f"while {being_written[-1]} is written"
    try:
        row = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return "before the first step"
    return f"after step {row['step']} of {row['phase']} was logged"


def finish(job: Job) -> None:
    job.wait(600)
    if any(process.returncode for process in job.processes):
        sys.exit(f"a run that nobody stopped failed:\n{job.text()[-6000:]}")


if __name__ == "__main__":
    main()
